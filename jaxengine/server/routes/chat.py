"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.server.chat_prompt import ChatPrompt
from jaxengine.server.errors import ApiError
from jaxengine.server.generation import Generation
from jaxengine.server.logprobs import chat_logprobs, prompt_logprobs
from jaxengine.server.parsers.deltas import Delta, ParsedOutput, ToolCallDelta
from jaxengine.server.protocol.chat import ChatRequest, ChatResponse
from jaxengine.server.request_ids import new_request_id
from jaxengine.server.routes.completions import ERRORS, STREAM
from jaxengine.server.sampling_fields import check_limits
from jaxengine.server.state import ServerState, state_of
from jaxengine.server.streaming import EventStream, event, unless_disconnected
from jaxengine.server.usage import UsageCounter, usage_of

router = APIRouter(tags=["text"])


@router.post("/v1/chat/completions", response_model=ChatResponse, responses={**ERRORS, **STREAM})
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    check_limits(body, state.settings)
    answer = ChatAnswer(state, body, new_request_id("chatcmpl", body.request_id, request))
    prompt = await answer.chat.encode()
    generation = Generation(state, [prompt], answer.chat.params, answer.id, body.priority)
    if not body.stream:
        return JSONResponse(await unless_disconnected(request, answer.whole(generation)))
    await generation.__aenter__()  # the status goes out before the stream: errors must be known
    return EventStream(
        answer.stream(generation), keep_alive_s=state.settings.sse_keep_alive_interval
    )


class ChatAnswer:
    """Writes the answer to one request.

    Args:
        state: The server's.
        body: The request.
        request_id: Its name.

    Raises:
        ValueError: If the request is not possible.
    """

    def __init__(self, state: ServerState, body: ChatRequest, request_id: str) -> None:
        self.id = request_id
        self._state = state
        self._body = body
        self._model = state.check_model(body.model)
        self._created = int(time.time())
        if body.top_logprobs and not body.logprobs:
            raise ApiError("top_logprobs need logprobs to be true", param="top_logprobs")
        self.chat = ChatPrompt(state, body)
        as_ids = body.return_tokens_as_token_ids
        self._as_ids = state.settings.return_tokens_as_token_ids if as_ids is None else as_ids

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Wait for all outputs and write them."""
        async with generation:
            (output,) = await generation.final()
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(each) for each in output.outputs],
            "usage": usage_of([output]),
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
            **(
                {"prompt_token_ids": output.prompt_token_ids} if self._body.return_token_ids else {}
            ),
        }

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Write events as tokens come."""
        options = self._body.stream_options
        has_usage = self._state.settings.enable_force_include_usage or bool(
            options and options.include_usage
        )
        is_continuous = bool(has_usage and options and options.continuous_usage_stats)
        usage, head = UsageCounter(), self._head("chat.completion.chunk")
        writers: dict[int, ChoiceWriter] = {}
        try:
            async with aclosing(generation.batches()) as batches:
                async for batch in batches:
                    events = []
                    for index, output in batch:
                        usage.add(index, output)
                        for choice in self._pieces(output, writers):
                            chunk = {**head, "choices": [choice]}
                            if is_continuous:
                                chunk["usage"] = usage.values()
                            events.append(event(chunk))
                    if events:
                        yield b"".join(events)
            if has_usage:
                yield event({**head, "choices": [], "usage": usage.values()})
        finally:
            await generation.__aexit__(None, None, None)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _pieces(
        self, output: RequestOutput, writers: dict[int, "ChoiceWriter"]
    ) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        for each in output.outputs:
            writer = writers.get(each.index)
            if writer is None:
                writer = writers[each.index] = ChoiceWriter(each.index, self.chat)
                choices.append(writer.first(self.chat.role, self.chat.echoed_text))
            logprobs = self._logprobs(each)
            pieces = writer.write(each, logprobs, self._body.include_reasoning)
            if self._body.return_token_ids and pieces:
                pieces[0]["token_ids"] = each.token_ids
            choices += pieces
        return choices

    def _choice(self, each: CompletionOutput) -> dict[str, Any]:
        parsed = self.chat.new_parser().parse(each.text)
        has_calls = bool(parsed.tool_calls)
        choice = {
            "index": each.index,
            "message": self._message(parsed),
            "logprobs": self._logprobs(each),
            "finish_reason": self.chat.finish_reason(each.finish_reason, has_calls),
            "stop_reason": each.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = each.token_ids
        return choice

    def _message(self, parsed: ParsedOutput) -> dict[str, Any]:
        reasoning = parsed.reasoning if self._body.include_reasoning else None
        content = parsed.content
        if self.chat.echoed_text:
            content = self.chat.echoed_text + (content or "")
        if content is None and not parsed.tool_calls:
            content = ""
        message: dict[str, Any] = {
            "role": self.chat.role,
            "content": content,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in parsed.tool_calls
        ]
        return message

    def _logprobs(self, each: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs or each.logprobs is None:
            return None
        num_top = None if self._body.logprob_token_ids else self._body.top_logprobs or 0
        return chat_logprobs(each.token_ids, [*each.logprobs], num_top, self._as_ids)


class ChoiceWriter:
    """Writes one output of a stream, piece by piece.

    Args:
        index: Its number.
        chat: What was asked.
    """

    def __init__(self, index: int, chat: ChatPrompt) -> None:
        self._index = index
        self._chat = chat
        self._parser = chat.new_parser()
        self._num_calls = 0

    def first(self, role: str, echoed_text: str) -> dict[str, Any]:
        """The piece that names the role."""
        return self._piece({"role": role, "content": echoed_text})

    def write(
        self, output: CompletionOutput, logprobs: dict[str, Any] | None, has_reasoning: bool
    ) -> list[dict[str, Any]]:
        """The pieces that new text makes, and the last one if it ends the output."""
        deltas = self._parser.feed(output.text)
        if output.finish_reason is not None:
            deltas += self._parser.finish()
        pieces = [
            self._piece(values)
            for delta in deltas
            if (values := self._values(delta, has_reasoning)) is not None
        ]
        if logprobs is not None and not pieces and logprobs["content"]:
            pieces.append(self._piece({}))  # tokens whose text is held back, or belongs to a marker
        if pieces and logprobs is not None:
            pieces[0]["logprobs"] = logprobs
        if output.finish_reason is not None:
            if not pieces:
                pieces.append(self._piece({}))
            reason = self._finish_reason(output.finish_reason)
            pieces[-1].update(finish_reason=reason, stop_reason=output.stop_reason)
        return pieces

    def _finish_reason(self, reason: str) -> str:
        return self._chat.finish_reason(reason, bool(self._num_calls)) or reason

    def _values(self, delta: Delta, has_reasoning: bool) -> dict[str, Any] | None:
        if delta.tool_call is not None:
            return {"tool_calls": [self._call(delta.tool_call)]}
        if delta.content:
            return {"content": delta.content}
        if delta.reasoning and has_reasoning:
            return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
        return None

    def _call(self, call: ToolCallDelta) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": call.arguments}
        values: dict[str, Any] = {"index": call.index, "function": function}
        if call.id is not None:
            self._num_calls += 1
            function["name"] = call.name
            values.update(id=call.id, type="function")
        return values

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
