"""/v1/responses: create, stream, retrieve, cancel. Stored in this process, the oldest go first."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxengine.server.chat_prompt import ChatPrompt
from jaxengine.server.errors import ApiError, as_api_error
from jaxengine.server.generation import Generation
from jaxengine.server.parsers.deltas import Delta, ParsedOutput
from jaxengine.server.protocol.responses import ResponsesRequest, ResponsesResponse
from jaxengine.server.request_ids import new_request_id
from jaxengine.server.response_events import ItemWriter
from jaxengine.server.responses_form import chat_request_of, items_of, messages_of
from jaxengine.server.routes.completions import ERRORS, STREAM
from jaxengine.server.sampling_fields import check_limits
from jaxengine.server.state import ServerState, state_of
from jaxengine.server.stored_responses import StoredResponse
from jaxengine.server.streaming import EventStream, unless_disconnected
from jaxengine.server.usage import UsageCounter

router = APIRouter(tags=["text"])


@router.post("/v1/responses", response_model=ResponsesResponse, responses={**ERRORS, **STREAM})
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation, or the next turn of a stored one."""
    state = state_of(request)
    answer = ResponseAnswer(state, body, new_request_id("resp", body.request_id, request))
    prompt = await answer.chat.encode()
    generation = Generation(state, [prompt], answer.chat.params, answer.id, body.priority)
    if body.stream:
        await generation.__aenter__()  # the status goes out first: errors must be known
        keep_alive_s = state.settings.sse_keep_alive_interval
        return EventStream(answer.stream(generation), done=b"", keep_alive_s=keep_alive_s)
    if body.background:
        await generation.__aenter__()
        answer.run_in_background(generation)
        return JSONResponse(answer.response)
    return JSONResponse(await unless_disconnected(request, answer.whole(generation)))


@router.get("/v1/responses/{response_id}", response_model=ResponsesResponse, responses=ERRORS)
async def retrieve_response(response_id: str, request: Request) -> Response:
    """Give a stored response."""
    return JSONResponse(state_of(request).responses.get(response_id).response)


@router.post(
    "/v1/responses/{response_id}/cancel", response_model=ResponsesResponse, responses=ERRORS
)
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response that runs in the background."""
    stored = state_of(request).responses.get(response_id)
    if stored.task is None:
        raise ApiError("only a response that runs in the background can be cancelled")
    if not stored.task.done():
        stored.task.cancel()
        stored.response["status"] = "cancelled"
    return JSONResponse(stored.response)


@router.delete("/v1/responses/{response_id}", response_model=None, responses=ERRORS)
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a stored response."""
    state_of(request).responses.remove(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


class ResponseAnswer:
    """Writes the answer to one request.

    Args:
        state: The server's.
        body: The request.
        request_id: Its name.

    Attributes:
        response: As far as it has come.

    Raises:
        ValueError: If the request is not possible.
    """

    def __init__(self, state: ServerState, body: ResponsesRequest, request_id: str) -> None:
        self.id = request_id
        self._state = state
        self._body = body
        if body.background and body.stream:
            raise ApiError("background and stream exclude each other", param="background")
        if body.background and not body.store:
            raise ApiError("background needs store to be true", param="store")
        self._messages = [*self._earlier_messages(), *messages_of(body.input)]
        chat = chat_request_of(body, self._messages)
        check_limits(chat, state.settings)
        self.chat = ChatPrompt(state, chat)
        self.response: dict[str, Any] = {
            "id": request_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": state.check_model(body.model),
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning,
            "store": bool(body.store),
            "temperature": self.chat.params.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self.chat.params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
        }

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Wait for the output and write it."""
        async with generation:
            (output,) = await generation.final()
        usage = UsageCounter()
        usage.add(0, output)
        each = output.outputs[0]
        parsed = self.chat.new_parser().parse(each.text)
        return self._finish(items_of(parsed), usage, each.finish_reason)

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Write events as tokens come."""
        usage, parser = UsageCounter(), self.chat.new_parser()
        writer = ItemWriter()
        try:
            yield writer.event("response.created", {"response": self.response})
            yield writer.event("response.in_progress", {"response": self.response})
            reason = None
            async with aclosing(generation.batches()) as batches:
                async for batch in batches:
                    events = []
                    for index, output in batch:
                        usage.add(index, output)
                        each = output.outputs[0]
                        deltas: list[Delta] = parser.feed(each.text)
                        if each.finish_reason is not None:
                            reason = each.finish_reason
                            deltas += parser.finish()
                        events += writer.write(deltas)
                    yield b"".join(events)
            yield b"".join(writer.close())
            response = self._finish(writer.items or items_of(ParsedOutput()), usage, reason)
            kind = "incomplete" if response["status"] == "incomplete" else "completed"
            yield writer.event(f"response.{kind}", {"response": response})
        except Exception as error:
            self._fail(error)
            yield writer.event("response.failed", {"response": self.response})
        finally:
            await generation.__aexit__(None, None, None)

    def run_in_background(self, generation: Generation) -> None:
        """Let the generation, which has begun, go on without its client."""

        async def run() -> None:
            try:
                (output,) = await generation.final()
                usage = UsageCounter()
                usage.add(0, output)
                each = output.outputs[0]
                parsed = self.chat.new_parser().parse(each.text)
                self._finish(items_of(parsed), usage, each.finish_reason)
            except Exception as error:
                self._fail(error)
            finally:
                await generation.__aexit__(None, None, None)

        self._keep(asyncio.create_task(run()))

    def _earlier_messages(self) -> list[dict[str, Any]]:
        name = self._body.previous_response_id
        return [] if name is None else self._state.responses.get(name).messages

    def _finish(
        self, items: list[dict[str, Any]], usage: UsageCounter, reason: str | None
    ) -> dict[str, Any]:
        counted = usage.values()
        is_cut = reason == "length"
        self.response.update(
            status="incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=items,
            usage={
                "input_tokens": counted["prompt_tokens"],
                "output_tokens": counted["completion_tokens"],
                "total_tokens": counted["total_tokens"],
                "input_tokens_details": counted["prompt_tokens_details"],
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        )
        if not self._state.responses.holds(self.id):
            self._keep(None)
        else:
            self._state.responses.get(self.id).messages += messages_of(items)
        return self.response

    def _fail(self, error: Exception) -> None:
        message = as_api_error(error).message
        self.response.update(status="failed", error={"code": "server_error", "message": message})

    def _keep(self, task: "asyncio.Task[None] | None") -> None:
        if self._body.store:
            items = self.response["output"]
            messages = [*self._messages, *messages_of(items)]
            self._state.responses.put(self.id, StoredResponse(self.response, messages, task))
