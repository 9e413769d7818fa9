"""/v1/messages: Anthropic's form, text and tools."""

from typing import Annotated, Any

from pydantic import Field

from jaxengine.server.protocol.common import INT32, Answer, Request


class InputMessage(Request):
    """A turn: text, or blocks of text, tool calls and their results."""

    role: str
    content: str | list[dict[str, Any]]


class MessagesRequest(Request):
    """A conversation to continue."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT32)]
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class CountTokensRequest(Request):
    """A conversation whose tokens are to be counted."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class MessageUsage(Answer):
    """Tokens of a message."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0


class MessagesResponse(Answer):
    """What the model says."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class CountTokensResponse(Answer):
    """Tokens of a conversation."""

    input_tokens: int
