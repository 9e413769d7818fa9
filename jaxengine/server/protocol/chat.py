"""/v1/chat/completions."""

from typing import Annotated, Any

from pydantic import Field

from jaxengine.server.protocol.common import Answer, Int32, Request, SamplingFields, UsageInfo


class ChatMessage(Request):
    """A message of a conversation; further fields are the template's."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingFields):
    """A conversation to continue."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Int32 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenLogprob(Answer):
    """Logprob of a token, and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(TokenLogprob):
    """Logprob of a token of the output, and of the most likely ones."""

    top_logprobs: list[TokenLogprob] = Field(default_factory=list)


class ChatLogprobs(Answer):
    """Logprobs of a choice."""

    content: list[ChatLogprob] | None = None


class FunctionCall(Answer):
    """What is called with what."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call that the model asks for."""

    id: str
    type: str = "function"
    function: FunctionCall


class AnswerMessage(Answer):
    """What the model says."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] = Field(default_factory=list)


class ChatChoice(Answer):
    """One output."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatResponse(Answer):
    """All outputs of a request."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    prompt_logprobs: list[dict[str, Any] | None] | None = None
