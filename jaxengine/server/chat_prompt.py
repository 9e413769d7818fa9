"""ChatPrompt: a conversation with its tools -> prompt, sampling parameters and output parser."""

import asyncio
from functools import cached_property
from typing import Any

from jaxengine.async_llm import LONG_TEXT
from jaxengine.sampling_params import SamplingParams
from jaxengine.server.errors import ApiError
from jaxengine.server.parsers.output_parser import OutputParser
from jaxengine.server.parsers.tool_choice import ToolChoice, read_tool_choice
from jaxengine.server.protocol.chat import ChatRequest
from jaxengine.server.sampling_fields import sampling_params, tokenization_of
from jaxengine.server.state import ServerState
from jaxengine.text.prompts import EncodedPrompt
from jaxengine.text.tokenizer import ChatOptions


class ChatPrompt:
    """What a chat request asks of the engine.

    Args:
        state: The server's.
        body: The request.

    Raises:
        ValueError: If it is not possible.
    """

    def __init__(self, state: ServerState, body: ChatRequest) -> None:
        self._state = state
        self._body = body
        self._tool_choice = self._read_tools()
        self._prompt_text = ""

    async def encode(self) -> EncodedPrompt:
        """Write the conversation with the model's template, and cut it into tokens.

        Raises:
            ValueError: If the template refuses it.
        """
        body, llm = self._body, self._state.llm
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        size = sum(len(str(message.get("content", ""))) for message in messages)
        options = self._options()
        if size > LONG_TEXT:
            text = await asyncio.to_thread(llm.frontend.render, messages, options)
        else:
            text = llm.frontend.render(messages, options)
        self._prompt_text = text
        prompt: dict[str, Any] = {"prompt": text}
        if body.cache_salt is not None:
            prompt["cache_salt"] = body.cache_salt
        tokenization = tokenization_of(body, add_special_tokens=body.add_special_tokens)
        return await llm.encode_prompt(prompt, tokenization)

    @cached_property
    def params(self) -> SamplingParams:
        """The request's sampling parameters.

        Raises:
            ValueError: If they are not possible.
        """
        body = self._body
        own: dict[str, Any] = {
            "max_tokens": body.max_completion_tokens or body.max_tokens,
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }
        if body.logprob_token_ids and body.logprobs:
            own["logprobs"] = len(body.logprob_token_ids)
        params = sampling_params(
            body, self._state.llm.info.sampling_defaults, default_max_tokens=None, **own
        )
        if (forced := self._tool_choice.structured_outputs) is not None:
            if params.structured_outputs is not None:
                raise ApiError(
                    "tool_choice forces a call, which excludes response_format and "
                    "structured_outputs",
                    param="tool_choice",
                )
            params = params.clone(structured_outputs=forced)
        if self.new_parser().needs_special_tokens:
            params = params.clone(skip_special_tokens=False)
        return params

    @property
    def role(self) -> str:
        """Who speaks in the answer."""
        body = self._body
        return (
            self._state.settings.response_role
            if body.add_generation_prompt
            else (body.messages[-1].role)
        )

    @property
    def echoed_text(self) -> str:
        """The last message, if the request wants it in front of the answer."""
        content = self._body.messages[-1].content
        return content if self._body.echo and isinstance(content, str) else ""

    def new_parser(self) -> OutputParser:
        """Return a parser for one output."""
        return OutputParser(
            tool_parser=self._state.settings.tool_call_parser,
            reasoning_parser=self._state.reasoning_parser,
            tools=self._body.tools or (),
            tool_choice=self._tool_choice,
            prompt=self._prompt_text,
        )

    def finish_reason(self, reason: str | None, has_calls: bool) -> str | None:
        """Return why an output ended, as OpenAI says it."""
        is_named = self._tool_choice.mode == "named"
        return "tool_calls" if reason == "stop" and has_calls and not is_named else reason

    def _read_tools(self) -> ToolChoice:
        body, settings = self._body, self._state.settings
        asked = body.tool_choice
        if asked is None and body.tools and not settings.enable_auto_tool_choice:
            asked = "none"
        choice = read_tool_choice(
            body.tools, asked, parallel_tool_calls=body.parallel_tool_calls is not False
        )
        if choice.mode == "auto" and not settings.enable_auto_tool_choice:
            raise ApiError(
                'tool_choice "auto" needs a server with --enable-auto-tool-choice and '
                "--tool-call-parser",
                param="tool_choice",
            )
        return choice

    def _options(self) -> ChatOptions:
        body, settings = self._body, self._state.settings
        if body.chat_template is not None and not settings.trust_request_chat_template:
            raise ApiError(
                "chat_template is not taken from requests: start the server with "
                "--trust-request-chat-template, or give it --chat-template",
                param="chat_template",
            )
        variables = {
            **(settings.default_chat_template_kwargs or {}),
            **(body.chat_template_kwargs or {}),
        }
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        has_tools = self._tool_choice.mode != "none"
        arguments = {
            "chat_template": body.chat_template or self._state.llm.frontend.chat_template,
            "content_format": settings.chat_template_content_format,
            "add_generation_prompt": body.add_generation_prompt,
            "continue_final_message": body.continue_final_message,
            "tools": body.tools if has_tools else None,
            "documents": body.documents,
        }
        return ChatOptions.merged(arguments, variables)
