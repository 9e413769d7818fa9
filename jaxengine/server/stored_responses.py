"""Responses that are kept for a next turn, in this process; the oldest go first."""

import asyncio
import collections
from dataclasses import dataclass
from typing import Any

from jaxengine.server.errors import NotFoundError


@dataclass
class StoredResponse:
    """A response, and what a next turn continues.

    Attributes:
        response: As it is sent.
        messages: Its conversation, the answer included.
        task: Works on it in the background, if it does.
    """

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    task: "asyncio.Task[None] | None" = None


class StoredResponses:
    """The newest responses by their names.

    Args:
        limit: How many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stored: collections.OrderedDict[str, StoredResponse] = collections.OrderedDict()

    def put(self, name: str, stored: StoredResponse) -> None:
        """Keep a response."""
        self._stored[name] = stored
        while len(self._stored) > self._limit:
            self._stored.popitem(last=False)

    def holds(self, name: str) -> bool:
        """Whether there is a response of that name."""
        return name in self._stored

    def get(self, name: str) -> StoredResponse:
        """Return a response.

        Raises:
            NotFoundError: If there is none of that name (any more).
        """
        if name not in self._stored:
            raise NotFoundError(f"there is no stored response {name!r}")
        return self._stored[name]

    def remove(self, name: str) -> None:
        """Forget a response.

        Raises:
            NotFoundError: If there is none of that name.
        """
        self.get(name)
        del self._stored[name]
