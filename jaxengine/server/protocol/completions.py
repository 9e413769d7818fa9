"""/v1/completions."""

from typing import Annotated, Any

from pydantic import Field

from jaxengine.server.protocol.common import Answer, Int32, SamplingFields, TokenId, UsageInfo


class CompletionRequest(SamplingFields):
    """Prompts to continue: text, token ids, or a list of either."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Int32 | None = 16
    logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: bool = True
    use_beam_search: bool = False


class CompletionLogprobs(Answer):
    """Logprobs of a choice, token after token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionResponse(Answer):
    """All outputs of a request."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo
