"""/v1/models, /tokenize, /detokenize and the small ones."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from jaxengine.server.protocol.chat import ChatMessage
from jaxengine.server.protocol.common import Answer, Request, TokenId


class ModelCard(Answer):
    """A model that requests may name."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "jaxengine"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(Answer):
    """All models."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeRequest(Request):
    """A text, or a conversation, to be cut into tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self


class TokenizeResponse(Answer):
    """Tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Request):
    """Tokens to be written as text."""

    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(Answer):
    """Text of tokens."""

    prompt: str


class Version(Answer):
    """Of the package."""

    version: str


class Load(Answer):
    """Requests that are worked on."""

    server_load: int
