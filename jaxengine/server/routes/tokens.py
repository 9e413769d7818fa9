"""POST /tokenize and /detokenize."""

from fastapi import APIRouter, Request

from jaxengine.server.errors import ApiError
from jaxengine.server.protocol.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from jaxengine.server.routes.completions import ERRORS
from jaxengine.server.state import ServerState, state_of
from jaxengine.text.prompts import checked
from jaxengine.text.tokenizer import ChatOptions

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """Cut a text, or a conversation as the model reads it, into tokens."""
    state = state_of(request)
    state.check_model(body.model)
    text, is_chat = _text_of(state, body)
    adds_special = body.add_special_tokens
    options = {"add_special_tokens": not is_chat if adds_special is None else adds_special}
    token_ids = (await state.llm.encode_prompt(text, options)).token_ids.tolist()
    texts = None
    if body.return_token_strs:
        tokenizer = state.llm.frontend.require_tokenizer().hf_tokenizer
        texts = list(tokenizer.convert_ids_to_tokens(token_ids))
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=state.llm.info.max_model_len,
        tokens=token_ids,
        token_strs=texts,
    )


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """Write tokens as text, special tokens included."""
    state = state_of(request)
    state.check_model(body.model)
    checked(0, body.tokens, state.llm.info.vocab_size)
    tokenizer = state.llm.frontend.require_tokenizer()
    return DetokenizeResponse(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))


def _text_of(state: ServerState, body: TokenizeRequest) -> tuple[str, bool]:
    if body.messages is None:
        return body.prompt or "", False
    if body.chat_template is not None and not state.settings.trust_request_chat_template:
        raise ApiError(
            "chat_template is not taken from requests: start the server with "
            "--trust-request-chat-template",
            param="chat_template",
        )
    arguments = {
        "chat_template": body.chat_template or state.llm.frontend.chat_template,
        "content_format": state.settings.chat_template_content_format,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "tools": body.tools,
    }
    variables = {
        **(state.settings.default_chat_template_kwargs or {}),
        **(body.chat_template_kwargs or {}),
    }
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    return state.llm.frontend.render(messages, ChatOptions.merged(arguments, variables)), True
