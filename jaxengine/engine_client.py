"""EngineClient: an engine as its front ends see it, in this process or in another one.

Everything that passes is numbers, short texts and numpy arrays. The engine knows nothing of text,
the front end nothing of devices.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxengine.engine.scheduling.scheduler_output import SchedulerStats
from jaxengine.engine.step_news import StepNews
from jaxengine.sampling_params import SamplingParams


class EngineDeadError(RuntimeError):
    """The engine has failed or was closed; the request is not to blame."""


@dataclass(slots=True)
class EngineRequest:
    """One output that the engine is to generate.

    Attributes:
        request_id: Unique among the unfinished requests of a client.
        prompt_token_ids: Checked against the vocabulary.
        params: Of one output (``n`` is 1).
        priority: Smaller runs first, with the priority policy.
        cache_salt: Cached blocks are shared only with requests of the same salt.
    """

    request_id: str
    prompt_token_ids: "array[int]"
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What a front end must know of an engine.

    Attributes:
        model: Name or path that the model was loaded from.
        vocab_size: Token ids are below it.
        max_model_len: Longest request, prompt and output.
        max_num_seqs: Most requests that run at the same time, over all replicas.
        block_size: Tokens of a KV block.
        num_blocks: KV blocks, over all replicas.
        max_prompt_len: Longest prompt whose K/V fit.
        eos_token_ids: Tokens that end an output.
        max_logprobs: Most log-probabilities a token; -1 for all.
        sampling_defaults: The model's own sampling parameters.
        compile_seconds: What compiling has taken so far, program by program.
        started_s: Seconds that the start has taken.
    """

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    max_prompt_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_logprobs: int = 20
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    compile_seconds: Sequence[float] = ()
    started_s: float = 0.0


@dataclass(slots=True)
class EngineNews:
    """What an engine tells one of its clients.

    Attributes:
        step: Of the client's requests.
        refused: Request id -> why it cannot run. Nothing else comes for such a request.
        failed: Why all requests of the client have ended, if they have; the engine goes on.
        dead: Why the engine has ended, if it has. No news come after that.
        stats: Counters, now and then.
    """

    step: StepNews = field(default_factory=StepNews)
    refused: dict[str, str] = field(default_factory=dict)
    failed: str | None = None
    dead: str | None = None
    stats: SchedulerStats | None = None


Listener = Callable[[EngineNews], None]


class EngineClient(Protocol):
    """One front end's side of an engine. No method waits for a step."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""

    def listen(self, listener: Listener) -> None:
        """Say where news go, before the first request. It must not wait."""

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests. Those that cannot run are ``refused`` in the news.

        Raises:
            EngineDeadError: If the engine has ended.
        """

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; nothing happens for those that have ended."""

    def finish(self, request_id: str, stop_reason: int | str | None) -> None:
        """End a request because its text holds a stop string."""

    def call(self, method: str, done: Callable[[Any], None], **arguments: Any) -> None:
        """Have the engine do something between two steps, such as ``reset_prefix_cache``.

        Args:
            method: One of ``EngineLoop.METHODS``.
            done: Gets the result, or an exception; called as the listener is.
            arguments: Of the method.
        """

    def close(self) -> None:
        """Abort this client's requests and leave; an engine of its own ends."""
