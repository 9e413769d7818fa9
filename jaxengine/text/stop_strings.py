"""Finds stop strings in growing text, and the text that could become one."""

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """Where a stop string was found.

    Attributes:
        stop: The string.
        start: Index of its first character in the text.
    """

    stop: str
    start: int


class StopStrings:
    """The stop strings of one request.

    Args:
        stops: Non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._beginnings = frozenset(stop[:end] for stop in stops for end in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)

    def __bool__(self) -> bool:
        return bool(self._stops)

    def find(self, text: str, num_old_characters: int) -> StopMatch | None:
        """Find the stop string that is complete first; of several, the first of the list.

        That is the one that a reader of single characters would have stopped at, however many of
        them a token brings.

        Args:
            text: The whole text.
            num_old_characters: Leading part that was searched before; a stop string may
                begin in it but not end in it.
        """
        found: list[StopMatch] = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old_characters - len(stop) + 1))
            if start >= 0:
                found.append(StopMatch(stop, start))
        return min(found, key=lambda match: match.start + len(match.stop), default=None)

    def num_held_characters(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        end = text[-self._longest :] if self._longest else ""
        for start in range(len(end)):
            if end[start:] in self._beginnings:
                return len(end) - start
        return 0
