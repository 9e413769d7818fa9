"""SocketClient: an engine in another process, for the event loop of a front end."""

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxengine.engine_client import (
    EngineDeadError,
    EngineInfo,
    EngineNews,
    EngineRequest,
    Listener,
)
from jaxengine.server.connection import PREFIX, connect, framed, message_size
from jaxengine.server.wire import (
    Message,
    WireError,
    decode_info,
    decode_news,
    decode_result,
    encode_request,
    unpack,
)

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
Facts = Mapping[str, Any]


class SocketClient:
    """One front end's side of an engine's process (an ``EngineClient``).

    News come on the event loop on which ``open`` was called.

    Attributes:
        last_heard: ``time.monotonic`` of the last message; the engine sends one a second at least.
        step_age_s: What the engine says of the time since its last step; 0 while it has no work.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.last_heard = time.monotonic()
        self.step_age_s = 0.0
        self._reader = reader
        self._writer = writer
        self._info: EngineInfo | None = None
        self._listener: Listener = lambda news: None
        self._numbers = itertools.count()
        self._number_of: dict[str, int] = {}
        self._name_of: dict[int, str] = {}
        self._calls: dict[int, Callable[[Any], None]] = {}
        self._death: str | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, path: str, key: bytes) -> "SocketClient":
        """Connect to the engine that listens at a path.

        Raises:
            ConnectionError: If there is none, or it has another key.
        """
        raw: socket.socket = await asyncio.to_thread(connect, path, key)
        reader, writer = await asyncio.open_unix_connection(sock=raw, limit=READ_BYTES)
        return cls(reader, writer)

    async def receive_facts(self) -> Facts:
        """Wait for what the engine says of the model before it has loaded it.

        Raises:
            EngineDeadError: If it cannot be served.
        """
        return await self._expect("model")

    async def wait_until_ready(self) -> None:
        """Wait until the engine serves; news come from then on.

        Raises:
            EngineDeadError: If it has failed to start.
        """
        self._info = decode_info(await self._expect("ready"))
        self._reading = asyncio.create_task(self._read())

    @property
    def info(self) -> EngineInfo:
        """What the engine is, once it is ready."""
        assert self._info is not None, "the engine is not ready"
        return self._info

    def listen(self, listener: Listener) -> None:
        """Say where news go; called on the event loop."""
        self._listener = listener

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests."""
        self._check_alive()
        encoded = []
        for request in requests:
            number = next(self._numbers)
            encoded.append(encode_request(number, request))
            self._number_of[request.request_id] = number
            self._name_of[number] = request.request_id
        self._send(["add", encoded])

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; nothing happens for those that have ended."""
        numbers = [number for each in request_ids if (number := self._forget(each)) is not None]
        if numbers and self._death is None:
            self._send(["abort", numbers])

    def finish(self, request_id: str, stop_reason: int | str | None) -> None:
        """End a request because its text holds a stop string."""
        number = self._forget(request_id)
        if number is not None and self._death is None:
            self._send(["finish", number, stop_reason])

    def call(self, method: str, done: Callable[[Any], None], **arguments: Any) -> None:
        """Have the engine do something between two steps."""
        self._check_alive()
        number = next(self._numbers)
        self._calls[number] = done
        self._send(["call", number, method, arguments])

    def close(self) -> None:
        """Leave; the engine aborts what this side has left behind."""
        if self._death is None:
            self._death = "this process has left the engine"
        if self._reading is not None:
            self._reading.cancel()
        with contextlib.suppress(Exception):
            self._writer.close()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _send(self, message: Message) -> None:
        self._writer.write(framed(message))

    async def _receive(self) -> Message:
        prefix = await self._reader.readexactly(PREFIX.size)
        data = await self._reader.readexactly(message_size(prefix))
        self.last_heard = time.monotonic()
        return unpack(data)

    async def _expect(self, kind: str) -> Facts:
        while True:
            try:
                message = await self._receive()
            except (OSError, asyncio.IncompleteReadError) as error:
                raise EngineDeadError(f"the engine has ended at its start: {error!r}") from None
            match message:
                case ["failed", str(reason)]:
                    raise EngineDeadError(reason)
                case [str(found), dict(values)] if found == kind:
                    return values
                case ["alive", *_]:
                    continue
            raise WireError(f"{kind!r} was expected, got {message!r:.200}")

    async def _read(self) -> None:
        """Take in the engine's messages until it is gone (a task of its own)."""
        try:
            while True:
                self._take(await self._receive())
        except (OSError, asyncio.IncompleteReadError):
            self._die("the engine's process has ended")
        except Exception as error:
            logger.exception("the engine's messages cannot be read")
            self._die(f"the engine's messages cannot be read: {error!r:.200}")

    def _take(self, message: Message) -> None:
        match message:
            case ["news", *_]:
                self._take_news(decode_news(message, self._name_of))
            case ["alive", int() | float() as step_age_s]:
                self.step_age_s = float(step_age_s)
            case ["result", int(number), result]:
                if (done := self._calls.pop(number, None)) is not None:
                    done(decode_result(result))
            case _:
                raise WireError(f"a message cannot be read: {message!r:.200}")

    def _take_news(self, news: EngineNews) -> None:
        for output in news.step.outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        for request_id in news.refused:
            self._forget(request_id)
        if news.failed is not None:
            self._name_of.clear()
            self._number_of.clear()
        if news.dead is not None:
            self._die(news.dead, news)
        else:
            self._listener(news)

    def _die(self, reason: str, news: EngineNews | None = None) -> None:
        if self._death is not None:
            return
        self._death = reason
        for done in self._calls.values():
            done(EngineDeadError(reason))
        self._calls.clear()
        self._listener(news or EngineNews(dead=reason))

    def _forget(self, request_id: str) -> int | None:
        number = self._number_of.pop(request_id, None)
        if number is not None:
            del self._name_of[number]
        return number
