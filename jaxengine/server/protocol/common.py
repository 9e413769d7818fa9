"""What the endpoints' requests and answers have in common, as pydantic models."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

INT32 = 2**31 - 1
Int32 = Annotated[int, Field(ge=0, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: Error


class Request(BaseModel):
    """A body; fields that are not known are left out of account."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Answer(BaseModel):
    """A body that the server sends."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0


class UsageInfo(Answer):
    """Tokens of a request."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class StreamOptions(Request):
    """What a stream holds besides its chunks."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class SamplingFields(Request):
    """Sampling parameters under the names of OpenAI and vLLM."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=16384)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Int32 = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    logprob_token_ids: list[TokenId] | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    truncation_side: str | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    cache_salt: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    vllm_xargs: dict[str, Any] | None = None
