"""EngineLoop: a thread that steps an engine for any number of clients, and tells each its news.

Commands wait in one queue and are carried out between two steps. Clients are told on the loop's
thread, once a step, so what they do there delays everybody's next step.
"""

import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxengine.engine.garbage_collection import paused_garbage_collection
from jaxengine.engine.step_news import StepNews
from jaxengine.engine_client import (
    EngineDeadError,
    EngineInfo,
    EngineNews,
    EngineRequest,
    Listener,
)
from jaxengine.structured.constraint import TokenConstraint
from jaxengine.structured.constraint_factory import ConstraintFactory

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.5
NUM_GRAMMAR_WAITERS = 8  # requests whose grammars are waited for at the same time

Command = Callable[[], None]


class LoopClient:
    """One front end of an EngineLoop (an ``EngineClient``).

    Args:
        loop: Whose client it is.
        owns_loop: Whether ``close`` ends the loop.
    """

    def __init__(self, loop: "EngineLoop", owns_loop: bool) -> None:
        self._loop = loop
        self._owns_loop = owns_loop
        self.tell: Listener = lambda news: None
        self.engine_ids: dict[str, str] = {}  # request id -> the engine's name of it

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._loop.info

    def listen(self, listener: Listener) -> None:
        """Say where news go; called on the loop's thread."""
        self.tell = listener

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests."""
        self._loop.check_alive()
        for request in requests:
            self._loop.submit(self, request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; nothing happens for those that have ended."""
        self._loop.put(lambda: self._loop.abort(self, request_ids))

    def finish(self, request_id: str, stop_reason: int | str | None) -> None:
        """End a request because its text holds a stop string."""
        self._loop.put(lambda: self._loop.finish(self, request_id, stop_reason))

    def call(self, method: str, done: Callable[[Any], None], **arguments: Any) -> None:
        """Have the engine do something between two steps."""
        self._loop.check_alive()
        self._loop.put(lambda: done(self._loop.perform(method, arguments)))

    def close(self) -> None:
        """Abort this client's requests and leave."""
        self._loop.put(lambda: self._loop.remove(self))
        if self._owns_loop:
            self._loop.close()


class EngineLoop:
    """Steps an engine while there is work.

    Args:
        engine: An ``Engine`` or a ``ReplicaGroup``; used by nobody else from now on.
        info: What clients are told of it.
        constraints: Makes the constraints of requests; None refuses those that need one.
        methods: What ``call`` may ask for, besides the engine's own.

    Attributes:
        last_step_time: ``time.monotonic`` of the last sign of progress.
        is_working: Whether a step is due; False while it waits for commands.
        num_steps: Since the start.
    """

    METHODS = ("reset_prefix_cache", "stats")

    def __init__(
        self,
        engine: Any,
        info: EngineInfo,
        constraints: ConstraintFactory | None = None,
        methods: dict[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.info = info
        self.num_steps = 0
        self.last_step_time = time.monotonic()
        self.is_working = False
        self._engine = engine
        self._constraints = constraints
        self._methods = methods or {}
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._clients: list[LoopClient] = []
        self._owners: dict[str, tuple[LoopClient, str]] = {}  # by the engine's request id
        self._num_requests = 0
        self._next_stats = 0.0
        self._has_failed = False  # the last step has
        self._has_news_of_stats = False
        self._death: str | None = None
        self._lock = threading.Lock()  # of the death: who sees none is sure to be told later
        self._waiters = concurrent.futures.ThreadPoolExecutor(
            NUM_GRAMMAR_WAITERS, thread_name_prefix="grammar-wait"
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def death(self) -> str | None:
        """Why the loop has ended; None while it runs."""
        return self._death

    @property
    def request_ids(self) -> list[str]:
        """Unfinished requests, by the engine's names."""
        return list(self._owners)

    def connect(self, *, owns_loop: bool = False) -> LoopClient:
        """Return a new client.

        Args:
            owns_loop: Whether the loop ends with it.
        """
        client = LoopClient(self, owns_loop)
        self.put(lambda: self._clients.append(client))
        return client

    def close(self) -> None:
        """End the thread; requests that still run are told that the engine is dead."""
        self._commands.put(None)
        self._thread.join()
        self._waiters.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait until the loop has ended."""
        self._thread.join()

    def check_alive(self) -> None:
        """Raise if the loop has ended.

        Raises:
            EngineDeadError: Saying why.
        """
        if self._death is not None:
            raise EngineDeadError(self._death)

    def put(self, command: Command) -> None:
        """Have a command carried out between two steps."""
        self._commands.put(command)

    def submit(self, client: LoopClient, request: EngineRequest) -> None:
        """Queue a request; one with a constraint comes when its grammar is compiled."""
        params = request.params
        if params.structured_outputs is None and params.thinking_token_budget is None:
            self.put(lambda: self._add(client, request, None))
            return
        self.put(lambda: self._expect(client, request))
        self._waiters.submit(self._compile, client, request)

    def abort(self, client: LoopClient, request_ids: Sequence[str]) -> None:
        """End some of a client's requests (on the loop's thread)."""
        for request_id in request_ids:
            engine_id = client.engine_ids.pop(request_id, None)
            if engine_id is not None:
                del self._owners[engine_id]
                self._engine.abort(engine_id)

    def finish(self, client: LoopClient, request_id: str, stop_reason: int | str | None) -> None:
        """End a request because of its text (on the loop's thread)."""
        engine_id = client.engine_ids.pop(request_id, None)
        if engine_id is not None:
            del self._owners[engine_id]
            self._engine.finish(engine_id, stop_reason)

    def perform(self, method: str, arguments: dict[str, Any]) -> Any:
        """Do what a client has called for; return its result or the exception."""
        try:
            if method in self.METHODS:
                return getattr(self._engine, method)(**arguments)
            if method not in self._methods:
                raise ValueError(f"the engine has no method {method!r}")
            return self._methods[method](**arguments)
        except Exception as error:
            return error

    def remove(self, client: LoopClient) -> None:
        """Forget a client and its requests (on the loop's thread)."""
        self.abort(client, list(client.engine_ids))
        if client in self._clients:
            self._clients.remove(client)

    def _compile(self, client: LoopClient, request: EngineRequest) -> None:
        """Wait for a request's grammar, then queue it (on a thread of its own)."""
        try:
            if self._constraints is None:
                raise ValueError("structured outputs need the model's tokenizer")
            make = self._constraints.maker(request.params, request.prompt_token_ids)
            constraint = make()
        except Exception as error:
            reason = str(error)
            self.put(lambda: self._refuse(client, request.request_id, reason))
        else:
            self.put(lambda: self._add_expected(client, request, constraint))

    def _expect(self, client: LoopClient, request: EngineRequest) -> None:
        """Take a name for a request whose grammar is still compiled, so that it can be aborted."""
        engine_id = self._new_name(client, request.request_id)
        client.engine_ids[request.request_id] = engine_id
        self._owners[engine_id] = (client, request.request_id)

    def _add_expected(
        self, client: LoopClient, request: EngineRequest, constraint: TokenConstraint | None
    ) -> None:
        if request.request_id in client.engine_ids:  # else it was aborted
            self._forget(client, request.request_id)
            self._add(client, request, constraint)

    def _add(
        self, client: LoopClient, request: EngineRequest, constraint: TokenConstraint | None
    ) -> None:
        if request.request_id in client.engine_ids:
            self._tell(client, EngineNews(refused={request.request_id: "its id is in use"}))
            return
        engine_id = self._new_name(client, request.request_id)
        try:
            self._engine.add_request(
                engine_id,
                request.prompt_token_ids,
                request.params,
                priority=request.priority,
                constraint=constraint,
                cache_salt=request.cache_salt,
            )
        except Exception as error:  # of this request alone: nothing of it was queued
            self._refuse(client, request.request_id, str(error))
            return
        client.engine_ids[request.request_id] = engine_id
        self._owners[engine_id] = (client, request.request_id)

    def _new_name(self, client: LoopClient, request_id: str) -> str:
        """Name a request. A single client's names stay: seeds are drawn from them."""
        if len(self._clients) <= 1 and request_id not in self._owners:
            return request_id
        self._num_requests += 1
        return f"{request_id}#{self._num_requests}"

    def _refuse(self, client: LoopClient, request_id: str, reason: str) -> None:
        self._forget(client, request_id)
        self._tell(client, EngineNews(refused={request_id: reason}))

    def _forget(self, client: LoopClient, request_id: str) -> None:
        engine_id = client.engine_ids.pop(request_id, None)
        if engine_id is not None:
            del self._owners[engine_id]

    def _run(self) -> None:
        try:
            while self._carry_out_commands():
                self._step()
        except BaseException as error:
            logger.exception("the engine has failed")
            self._end(f"the engine has failed: {type(error).__name__}: {error}")
        else:
            self._end("the engine was closed")

    def _carry_out_commands(self) -> bool:
        """Carry out what waits; without work, wait for more. Returns False to end."""
        while True:
            self.is_working = self._engine.has_unfinished_requests
            if not self.is_working and self._has_news_of_stats:
                self._tell_stats()
            try:
                command = self._commands.get(block=not self.is_working)
            except queue.Empty:
                return True
            self.last_step_time = time.monotonic()
            if command is None:
                return False
            command()
            self._has_news_of_stats = True

    @paused_garbage_collection()  # what a step makes is gone when it returns
    def _step(self) -> None:
        try:
            news = self._engine.step()
        except Exception as error:
            self._fail(error)
            return
        self._has_failed = False
        self.num_steps += 1
        now = self.last_step_time = time.monotonic()
        self._has_news_of_stats = True
        for client, share in self._split(news).items():
            self._tell(client, EngineNews(share))
        if now >= self._next_stats:
            self._tell_stats()

    def _tell_stats(self) -> None:
        self._next_stats = time.monotonic() + STATS_INTERVAL_S
        self._has_news_of_stats = False
        stats = self._engine.stats()
        for client in tuple(self._clients):
            self._tell(client, EngineNews(stats=stats))

    def _split(self, news: StepNews) -> dict[LoopClient, StepNews]:
        """Sort news by client, under its own names; leave out what was aborted."""
        shares: dict[LoopClient, StepNews] = {}
        for chunk in news.prompt_logprobs:
            if (owner := self._owners.get(chunk.request_id)) is not None:
                client, chunk.request_id = owner
                shares.setdefault(client, StepNews()).prompt_logprobs.append(chunk)
        for output in news.outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            client, request_id = owner
            if output.finish_reason is not None:
                del self._owners[output.request_id], client.engine_ids[request_id]
            output.request_id = request_id
            share = shares.get(client)
            if share is None:
                share = shares[client] = StepNews()
            share.outputs.append(output)
        return shares

    def _tell(self, client: LoopClient, news: EngineNews) -> None:
        try:
            client.tell(news)
        except Exception:  # its process or event loop is gone
            logger.exception("a client cannot be told its news")
            self.remove(client)

    def _fail(self, error: Exception) -> None:
        """All requests have ended with a step that failed; a second one in a row ends the loop."""
        logger.error("a step has failed", exc_info=error)
        reason = f"a step of the engine has failed: {type(error).__name__}: {error}"
        self._owners.clear()
        for client in list(self._clients):
            if client.engine_ids:
                client.engine_ids.clear()
                self._tell(client, EngineNews(failed=reason))
        if self._has_failed or type(error).__name__ == "HostLostError":
            raise error
        self._has_failed = True

    def _end(self, reason: str) -> None:
        with self._lock:
            self._death = reason
        self.is_working = False
        for engine_id in self._owners:
            with contextlib.suppress(Exception):  # a broken engine may refuse even that
                self._engine.abort(engine_id)
        self._owners.clear()
        for client in list(self._clients):
            with contextlib.suppress(Exception):
                client.tell(EngineNews(dead=reason))
