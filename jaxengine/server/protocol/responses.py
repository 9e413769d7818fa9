"""/v1/responses, text only."""

from typing import Annotated, Any

from pydantic import Field

from jaxengine.server.protocol.common import INT32, Answer, Request, TokenId


class ResponsesRequest(Request):
    """A conversation, or the next turn of a stored one."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    stream: bool | None = False
    max_output_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop_token_ids: list[TokenId] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = False
    truncation: str | None = "disabled"
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    cache_salt: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class ResponseUsage(Answer):
    """Tokens of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ResponsesResponse(Answer):
    """What the model has made of it."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None = None
