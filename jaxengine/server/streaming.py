"""EventStream: server-sent events, and what happens when the client goes away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxengine.server.errors import sse_error

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection; nobody reads an answer."""


def event(values: Mapping[str, Any]) -> bytes:
    """Write one event."""
    return (
        b"data: "
        + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        + b"\n\n"
    )


def named_event(name: str, values: Mapping[str, Any]) -> bytes:
    """Write one event that has a name."""
    return b"event: " + name.encode() + b"\n" + event(values)


class EventStream(Response):
    """Sends pieces of events as they come; closes their source when the client goes away.

    Args:
        events: Whole events, as bytes.
        done: Sent at the end.
        keep_alive_s: Silence after which a comment is sent; 0 for none.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        done: bytes = DONE,
        keep_alive_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._events = events
        self._done = done
        self._keep_alive_s = keep_alive_s
        self.status_code = 200
        self.background = None
        no_buffers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers({**no_buffers, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events):
            try:
                await self._send_events(send)
            except OSError:  # the client is gone
                return
            except Exception as error:
                await send(
                    {"type": "http.response.body", "body": sse_error(error), "more_body": True}
                )
        await send({"type": "http.response.body", "body": self._done, "more_body": False})

    async def _send_events(self, send: Send) -> None:
        if not self._keep_alive_s:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            return
        coming: asyncio.Future[bytes] = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=self._keep_alive_s)
                body = KEEP_ALIVE
                if done:
                    try:
                        body = coming.result()
                    except StopAsyncIteration:
                        return
                    coming = asyncio.ensure_future(anext(self._events))
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            if not coming.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run something for a client, and cancel it when the client goes away.

    Raises:
        ClientGoneError: If it has.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
