"""Parsers of reasoning between two markers: DeepSeek-R1, Qwen3, and any model with such tags."""

from jaxengine.server.parsers.stream_parser import Parsing, StreamParser
from jaxengine.structured.reasoning import THINK, ReasoningMarkers


class ThinkParser(StreamParser):
    """Blocks of reasoning anywhere in the text; all else is content.

    Args:
        is_open: Whether the prompt has begun a block that the output goes on with.
        markers: What begins and ends a block.
    """

    def __init__(self, *, is_open: bool = False, markers: ReasoningMarkers = THINK) -> None:
        self._is_open = is_open
        self._markers = markers
        super().__init__()

    def _parse(self) -> Parsing[None]:
        if self._is_open:
            yield from self._until([self._markers.end], self._reasoning)
        while (yield from self._until([self._markers.start], self._content)) is not None:
            yield from self._until([self._markers.end], self._reasoning)


class LeadingThinkParser(ThinkParser):
    """One block at the beginning at most; what looks like a marker later is content.

    Qwen3: without a start marker, in the output or in the prompt, there is no reasoning.
    """

    # Whether an output without a start marker is reasoning all the same.
    reasons_always = False

    def _parse(self) -> Parsing[None]:
        space = yield from self._space()
        is_open = self._is_open or self.reasons_always
        if (yield from self._at(self._markers.start)):
            self._take(len(self._markers.start))
            is_open, space = True, ""
        if is_open:
            self._reasoning(space)
            yield from self._until([self._markers.end], self._reasoning)
        else:
            self._content(space)
        yield from self._rest(self._content)


class DeepSeekR1Parser(LeadingThinkParser):
    """DeepSeek-R1 always reasons: its template has written the start marker, or has not."""

    reasons_always = True


def prompt_leaves_open(prompt: str, markers: ReasoningMarkers = THINK) -> bool:
    """Whether a prompt has begun reasoning that the output goes on with."""
    return prompt.rfind(markers.start) > prompt.rfind(markers.end)


def prompt_closes(prompt: str, markers: ReasoningMarkers = THINK) -> bool:
    """Whether a prompt ends with reasoning that is over: the model was told not to reason."""
    return prompt.rstrip().endswith(markers.end)
