"""What parsers make of an output: reasoning, content and tool calls, in pieces and as a whole."""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

NewId = Callable[[], str]


def new_call_id() -> str:
    """A name for a tool call, in the form that OpenAI's have."""
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        index: Which call of the output, from 0.
        arguments: The next piece of the arguments' JSON text.
        id: With the first piece only.
        name: The function's name, with the first piece only.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Delta:
    """One piece of an output: exactly one of the three is set."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass
class ToolCall:
    """A whole tool call; ``arguments`` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass
class ParsedOutput:
    """A whole output. What the output has nothing of is None."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def collect(deltas: Iterable[Delta]) -> ParsedOutput:
    """Put the pieces of an output together."""
    output = ParsedOutput()
    for delta in deltas:
        if delta.content:
            output.content = (output.content or "") + delta.content
        if delta.reasoning:
            output.reasoning = (output.reasoning or "") + delta.reasoning
        if (piece := delta.tool_call) is not None:
            if piece.index == len(output.tool_calls):
                output.tool_calls.append(ToolCall(piece.id or "", piece.name or "", ""))
            output.tool_calls[piece.index].arguments += piece.arguments
    return output


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Join neighbours of the same kind, so that a client gets few pieces."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else Delta()
        if delta.content and last.content:
            result[-1] = Delta(content=last.content + delta.content)
        elif delta.reasoning and last.reasoning:
            result[-1] = Delta(reasoning=last.reasoning + delta.reasoning)
        elif delta.tool_call and last.tool_call and delta.tool_call.index == last.tool_call.index:
            first, more = last.tool_call, delta.tool_call.arguments
            whole = ToolCallDelta(first.index, first.arguments + more, first.id, first.name)
            result[-1] = Delta(tool_call=whole)
        else:
            result.append(delta)
    return result
