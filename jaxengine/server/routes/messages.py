"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a chat."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxengine.outputs import CompletionOutput
from jaxengine.server.anthropic_form import chat_request_of, stop_reason_of
from jaxengine.server.chat_prompt import ChatPrompt
from jaxengine.server.errors import as_api_error
from jaxengine.server.generation import Generation
from jaxengine.server.parsers.deltas import Delta
from jaxengine.server.protocol.messages import (
    CountTokensRequest,
    CountTokensResponse,
    MessagesRequest,
    MessagesResponse,
)
from jaxengine.server.request_ids import new_request_id
from jaxengine.server.routes.completions import ERRORS, STREAM
from jaxengine.server.sampling_fields import check_limits
from jaxengine.server.state import ServerState, state_of
from jaxengine.server.streaming import EventStream, named_event, unless_disconnected
from jaxengine.server.usage import UsageCounter, usage_of

router = APIRouter(tags=["text"])


@router.post("/v1/messages", response_model=MessagesResponse, responses={**ERRORS, **STREAM})
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    answer = MessageAnswer(state, body, new_request_id("msg", None, request))
    prompt = await answer.chat.encode()
    generation = Generation(state, [prompt], answer.chat.params, answer.id)
    if not body.stream:
        return JSONResponse(await unless_disconnected(request, answer.whole(generation)))
    await generation.__aenter__()  # the status goes out before the stream: errors must be known
    keep_alive_s = state.settings.sse_keep_alive_interval
    return EventStream(answer.stream(generation), done=b"", keep_alive_s=keep_alive_s)


@router.post("/v1/messages/count_tokens", responses=ERRORS)
async def count_tokens(body: CountTokensRequest, request: Request) -> CountTokensResponse:
    """Count the tokens of a conversation."""
    state = state_of(request)
    state.check_model(body.model)
    values = body.model_dump(exclude_none=True)
    chat = chat_request_of(MessagesRequest.model_validate({**values, "max_tokens": 1}))
    prompt = await ChatPrompt(state, chat).encode()
    return CountTokensResponse(input_tokens=len(prompt.token_ids))


class MessageAnswer:
    """Writes the answer to one request.

    Args:
        state: The server's.
        body: The request.
        request_id: Its name.

    Raises:
        ValueError: If the request is not possible.
    """

    def __init__(self, state: ServerState, body: MessagesRequest, request_id: str) -> None:
        self.id = request_id
        self._model = state.check_model(body.model)
        chat = chat_request_of(body)
        check_limits(chat, state.settings)
        self.chat = ChatPrompt(state, chat)

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Wait for the output and write it."""
        async with generation:
            (output,) = await generation.final()
        each = output.outputs[0]
        parsed = self.chat.new_parser().parse(each.text)
        content: list[dict[str, Any]] = []
        if parsed.reasoning:
            content.append({"type": "thinking", "thinking": parsed.reasoning, "signature": ""})
        if parsed.content:
            content.append({"type": "text", "text": parsed.content})
        content += [
            {
                "type": "tool_use",
                "id": call.id,
                "name": call.name,
                "input": _as_object(call.arguments),
            }
            for call in parsed.tool_calls
        ]
        return {
            **self._head(content),
            **self._end(each, bool(parsed.tool_calls)),
            "usage": _usage(usage_of([output])),
        }

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Write events as tokens come."""
        usage, parser = UsageCounter(), self.chat.new_parser()
        blocks = BlockWriter()
        is_started = False
        try:
            async with aclosing(generation.batches()) as batches:
                async for batch in batches:
                    events = []
                    for index, output in batch:
                        usage.add(index, output)
                        if not is_started:
                            is_started = True
                            message = {**self._head([]), "usage": _usage(usage.values())}
                            start = {"type": "message_start", "message": message}
                            events.append(named_event("message_start", start))
                        each = output.outputs[0]
                        deltas = parser.feed(each.text)
                        if each.finish_reason is not None:
                            deltas += parser.finish()
                        events += blocks.write(deltas)
                        if each.finish_reason is not None:
                            events += blocks.close()
                            ended = {
                                "type": "message_delta",
                                "delta": self._end(each, blocks.has_calls),
                                "usage": _usage(usage.values()),
                            }
                            events.append(named_event("message_delta", ended))
                    yield b"".join(events)
            yield named_event("message_stop", {"type": "message_stop"})
        except Exception as error:
            said = as_api_error(error)
            about = {"type": "error", "error": {"type": "api_error", "message": said.message}}
            yield named_event("error", about)
        finally:
            await generation.__aexit__(None, None, None)

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _end(self, each: CompletionOutput, has_calls: bool) -> dict[str, Any]:
        reason = self.chat.finish_reason(each.finish_reason, has_calls)
        return stop_reason_of(reason, each.stop_reason, has_calls)


class BlockWriter:
    """Writes the blocks of a message: text, thinking and tool calls, one after the other."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: object = None  # of the block that is open; a call's is its number
        self.has_calls = False

    def write(self, deltas: list[Delta]) -> list[bytes]:
        """Write the events of some pieces."""
        events: list[bytes] = []
        for delta in deltas:
            if (call := delta.tool_call) is not None:
                if call.id is not None:
                    self.has_calls = True
                    block: dict[str, Any] = {
                        "type": "tool_use",
                        "id": call.id,
                        "name": call.name,
                        "input": {},
                    }
                    events += self._open(call.index, block)
                piece = {"type": "input_json_delta", "partial_json": call.arguments}
                events += self._delta(piece) if call.arguments else []
            elif delta.content:
                events += self._open("text", {"type": "text", "text": ""})
                events += self._delta({"type": "text_delta", "text": delta.content})
            elif delta.reasoning:
                block = {"type": "thinking", "thinking": "", "signature": ""}
                events += self._open("thinking", block)
                events += self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        return events

    def close(self) -> list[bytes]:
        """End the block that is open."""
        if self._kind is None:
            return []
        self._kind = None
        stop = {"type": "content_block_stop", "index": self._index}
        return [named_event("content_block_stop", stop)]

    def _open(self, kind: object, block: dict[str, Any]) -> list[bytes]:
        if kind == self._kind:
            return []
        events = self.close()
        self._index += 1
        self._kind = kind
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*events, named_event("content_block_start", start)]

    def _delta(self, delta: dict[str, Any]) -> list[bytes]:
        values = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return [named_event("content_block_delta", values)]


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_read_input_tokens": cached,
    }


def _as_object(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; what the model has not written as JSON is {}."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
