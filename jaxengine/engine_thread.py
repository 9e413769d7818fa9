"""EngineThread: one thread owns an LLM and steps it, so that callers of any thread share its batch.

No Ray here.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from jaxengine.llm import LLM
from jaxengine.outputs import RequestOutput

logger = logging.getLogger(__name__)

Deliver = Callable[[RequestOutput | Exception], object]


class EngineError(RuntimeError):
    """The engine has failed or was closed; the request is not to blame."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request of one caller.

    Attributes:
        arguments: Of ``LLM.add_request``.
        deliver: Takes its outputs.
        request_id: The LLM's name for it; None until the engine's thread has seen it.
        is_cancelled: Nobody waits for it any more.
    """

    arguments: dict[str, Any]
    deliver: Deliver
    request_id: str | None = None
    is_cancelled: bool = False


class EngineThread:
    """Runs the requests of many callers on one LLM, in one batch.

    Args:
        llm: Used by nobody else from now on.
    """

    def __init__(self, llm: LLM) -> None:
        self.num_steps = 0
        self._llm = llm
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._live: dict[str, Ticket] = {}
        self._error: EngineError | None = None
        self._lock = threading.Lock()  # of the error: who sees none is sure to be told later
        self._thread = threading.Thread(target=self._run, name="jaxengine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that the engine works on."""
        return len(self._live)

    def submit(self, deliver: Deliver, **arguments: Any) -> Ticket:
        """Queue a request.

        Args:
            deliver: Called on the engine's thread, so it must not wait. It gets each output, the
                last of which is ``finished``; or one exception, and nothing after it:
                ``ValueError`` if the request is not possible, ``EngineError`` if the engine has
                failed.
            arguments: Of ``LLM.add_request``.

        Raises:
            EngineError: If the engine has failed or was closed.
        """
        ticket = Ticket(arguments, deliver)
        with self._lock:
            self.check_health()
            self._inbox.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Abort a request; nothing happens if it has ended."""
        ticket.is_cancelled = True
        self._inbox.put(ticket)

    def result(self, **arguments: Any) -> concurrent.futures.Future[RequestOutput]:
        """Queue a request, and promise its last output or its exception."""
        future: concurrent.futures.Future[RequestOutput] = concurrent.futures.Future()

        def deliver(news: RequestOutput | Exception) -> None:
            if isinstance(news, Exception):
                future.set_exception(news)
            elif news.finished:
                future.set_result(news)

        self.submit(deliver, **arguments)
        return future

    async def stream(self, **arguments: Any) -> AsyncGenerator[RequestOutput, None]:
        """Queue a request, and give its outputs; closing the iterator early aborts it.

        Raises:
            ValueError: If the request is not possible.
            EngineError: If the engine fails.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        ticket = self.submit(
            lambda news: loop.call_soon_threadsafe(arrived.put_nowait, news), **arguments
        )
        try:
            is_finished = False
            while not is_finished:
                news = await arrived.get()
                if isinstance(news, Exception):
                    raise news
                is_finished = news.finished
                yield news
        finally:
            self.cancel(ticket)

    def check_health(self) -> None:
        """Raise the ``EngineError`` that has ended the thread, if any."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; requests that still run get an ``EngineError``."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_requests():
                outputs = self._llm.step()
                self.num_steps += 1
                for output in outputs:
                    self._hand_out(output)
        except Exception as error:
            logger.exception("the engine has failed")
            failure = EngineError(f"the engine has failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._end(failure)
        else:
            self._end(EngineError("the engine was closed"))

    def _take_requests(self) -> bool:
        """Admit what has arrived, waiting for it if nothing runs; returns False to close."""
        while True:
            try:
                ticket = self._inbox.get(block=not self._live)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if ticket.is_cancelled:
                self._abort(ticket)
            else:
                self._admit(ticket)

    def _admit(self, ticket: Ticket) -> None:
        try:
            ticket.request_id = self._llm.add_request(**ticket.arguments)
        except Exception as error:  # of this request alone: nothing of it was queued
            self._send(ticket, error)
        else:
            self._live[ticket.request_id] = ticket

    def _abort(self, ticket: Ticket) -> None:
        if ticket.request_id is not None and self._live.pop(ticket.request_id, None) is not None:
            self._llm.abort_request(ticket.request_id)

    def _hand_out(self, output: RequestOutput) -> None:
        ticket = self._live[output.request_id]
        if output.finished:
            del self._live[output.request_id]
        if not self._send(ticket, output):
            self._abort(ticket)

    def _send(self, ticket: Ticket, news: RequestOutput | Exception) -> bool:
        """Deliver; returns False if the caller can take nothing any more (its loop is closed)."""
        try:
            ticket.deliver(news)
        except Exception:
            logger.exception("an output could not be delivered")
            return False
        return True

    def _end(self, error: EngineError) -> None:
        """Refuse all further requests, and tell everybody who waits."""
        with self._lock:
            self._error = error
        waiting = list(self._live.values())
        for request_id in self._live:
            with contextlib.suppress(Exception):  # a broken engine may refuse even that
                self._llm.abort_request(request_id)
        self._live.clear()
        while not self._inbox.empty():
            ticket = self._inbox.get()
            if ticket is not None and not ticket.is_cancelled:
                waiting.append(ticket)
        for ticket in waiting:
            self._send(ticket, error)
