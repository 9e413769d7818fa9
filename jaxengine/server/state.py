"""ServerState: what the routes of one process share."""

import time
from dataclasses import dataclass, field

from fastapi import Request

from jaxengine.async_llm import AsyncLLM
from jaxengine.server.errors import ApiError, NotFoundError
from jaxengine.server.metrics import Metrics
from jaxengine.server.settings import ServerSettings
from jaxengine.server.stored_responses import StoredResponses


@dataclass
class ServerState:
    """An engine, and how it is served.

    Attributes:
        llm: The engine.
        settings: The flags.
        metrics: Counts what passes.
        reasoning_parser: How the model marks its reasoning; empty if it does not reason.
        created: When the server started, in seconds since 1970.
        num_requests: HTTP requests that are worked on.
        is_draining: Whether the server is about to end and takes nothing new.
    """

    llm: AsyncLLM
    settings: ServerSettings
    metrics: Metrics
    reasoning_parser: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    num_requests: int = 0
    is_draining: bool = False

    def __post_init__(self) -> None:
        """Make room for responses."""
        self.responses = StoredResponses(self.settings.max_stored_responses)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may give; the first is in the answers."""
        return tuple(self.settings.served_model_name or (self.llm.info.model,))

    def check_model(self, name: str | None) -> str:
        """Return the name to answer with.

        Raises:
            NotFoundError: If there is no such model.
        """
        if name and name not in self.model_names:
            raise NotFoundError(f"The model `{name}` does not exist.", param="model")
        return self.model_names[0]

    def check_room(self, num_tokens: int) -> None:
        """Refuse what would wait behind too many others.

        Raises:
            ApiError: With status 503.
        """
        settings, waiting = self.settings, self.llm.num_unfinished - self.llm.info.max_num_seqs
        if self.is_draining:
            raise ApiError("the server is about to end and takes no further requests", 503)
        if waiting >= settings.max_num_queued_reqs:
            raise ApiError(
                f"{waiting} requests wait already, max_num_queued_reqs is "
                f"{settings.max_num_queued_reqs}: try again later",
                503,
            )
        limit = settings.max_num_queued_tokens
        if limit is not None and self.llm.num_prompt_tokens + num_tokens > limit:
            raise ApiError(
                f"requests with {self.llm.num_prompt_tokens} prompt tokens are worked on, "
                f"max_num_queued_tokens is {limit}: try again later",
                503,
            )


def state_of(request: Request) -> ServerState:
    """Return the state of the app that a request came to."""
    state: ServerState = request.app.state.server
    return state
