"""StreamParser: parses an output while it is written, piece by piece.

A parser is written as if it had the whole text: a generator that takes text off a buffer and yields
where it needs more. What it decides depends on the text alone, never on where a piece ends, so the
pieces of an output, however it was cut, add up to the same as the whole text in one piece.
"""

import abc
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from jaxengine.server.parsers.deltas import (
    Delta,
    NewId,
    ParsedOutput,
    ToolCallDelta,
    collect,
    joined,
    new_call_id,
)

T = TypeVar("T")
Parsing = Generator[None, None, T]  # yields for more text
Sink = Callable[[str], None]
SPACE = " \t\r\n"


class StreamParser(abc.ABC):
    """Parses one output.

    Args:
        new_id: Names tool calls.
    """

    # Whether markers are special tokens, which the text only has with skip_special_tokens=False.
    needs_special_tokens = False

    def __init__(self, new_id: NewId = new_call_id) -> None:
        self._new_id = new_id
        self._buffer = ""
        self._is_finished = False
        self._deltas: list[Delta] = []
        self._call_numbers = itertools.count()
        self._parsing = self._parse()
        next(self._parsing)

    @abc.abstractmethod
    def _parse(self) -> Parsing[None]:
        """Parse the output; must yield at least once, and whenever it needs more text."""

    def feed(self, text: str) -> list[Delta]:
        """Take in the next piece of the output; return what it brings."""
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """Say that the output has ended; return what was held back."""
        self._is_finished = True
        return self._advance()

    def parse(self, text: str) -> ParsedOutput:
        """Parse a whole output; of a new parser only."""
        return collect([*self.feed(text), *self.finish()])

    def _advance(self) -> list[Delta]:
        next(self._parsing, None)
        deltas, self._deltas = joined(self._deltas), []
        return deltas

    # What a parser can say.

    def _content(self, text: str) -> None:
        if text:
            self._deltas.append(Delta(content=text))

    def _reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(Delta(reasoning=text))

    def _begin_call(self, name: str) -> Sink:
        """Say that a tool call begins; return what takes its arguments."""
        index = next(self._call_numbers)
        self._deltas.append(Delta(tool_call=ToolCallDelta(index, "", self._new_id(), name)))

        def add_arguments(text: str) -> None:
            if text:
                self._deltas.append(Delta(tool_call=ToolCallDelta(index, text)))

        return add_arguments

    # What a parser can read.

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _peek(self, count: int = 1) -> Parsing[str]:
        """Return the next characters without taking them; fewer at the end of the output."""
        while len(self._buffer) < count and not self._is_finished:
            yield
        return self._buffer[:count]

    def _at(self, *markers: str) -> Parsing[str | None]:
        """Return the marker that comes next, without taking it; None if none of them does."""
        for marker in markers:
            for count in range(1, len(marker) + 1):
                if (yield from self._peek(count)) != marker[:count]:
                    break
            else:
                return marker
        return None

    def _space(self) -> Parsing[str]:
        """Take white space."""
        taken = ""
        while (yield from self._peek()) and self._buffer[0] in SPACE:
            count = len(self._buffer) - len(self._buffer.lstrip(SPACE))
            taken += self._take(count)
        return taken

    def _until(self, markers: Sequence[str], sink: Sink) -> Parsing[str | None]:
        """Hand text on until a marker, which is taken; return the marker, None at the end.

        Args:
            markers: None of them begins another.
            sink: Takes the text as it comes, but for what may become a marker.
        """
        while True:
            found = [(at, m) for m in markers if (at := self._buffer.find(m)) >= 0]
            if found:
                position, marker = min(found)
                sink(self._take(position))
                self._take(len(marker))
                return marker
            if self._is_finished:
                sink(self._take(len(self._buffer)))
                return None
            sink(self._take(len(self._buffer) - _num_held_back(self._buffer, markers)))
            yield

    def _rest(self, sink: Sink) -> Parsing[None]:
        """Hand everything on that is still to come."""
        yield from self._until((), sink)


class SpaceTrimmer:
    """A sink in front of a sink: leaves out white space at the beginning, or at the end, or both.

    Args:
        sink: Takes the text.
        is_at_start: Leave it out at the beginning.
    """

    def __init__(self, sink: Sink, *, is_at_start: bool) -> None:
        self._sink = sink
        self._is_at_start = is_at_start
        self._held = ""

    def __call__(self, text: str) -> None:
        """Hand text on, but for white space that may be the last."""
        text = self._held + text
        if self._is_at_start:
            text = text.lstrip(SPACE)
        kept = text.rstrip(SPACE)
        self._held = text[len(kept) :]
        if kept:
            self._is_at_start = False
            self._sink(kept)

    def release(self) -> None:
        """Hand on the white space at the end, which is not to be left out."""
        self._sink(self._held)
        self._held = ""


def _num_held_back(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-count:]) for marker in markers):
            return count
    return 0
