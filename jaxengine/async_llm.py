"""AsyncLLM: requests of one event loop on an engine, in this process or in another one.

Text is made here, on the event loop; the engine steps in a thread or a process of its own.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxengine.engine.scheduling.scheduler_output import SchedulerStats
from jaxengine.engine_client import (
    EngineClient,
    EngineDeadError,
    EngineInfo,
    EngineNews,
    EngineRequest,
)
from jaxengine.llm_arguments import as_priorities, refuse_foreign
from jaxengine.llm_engine import EngineArgs
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.frontend import Frontend
from jaxengine.text.prompts import EncodedPrompt, Prompt

logger = logging.getLogger(__name__)

AsyncEngineArgs = EngineArgs
Deliver = Callable[[RequestOutput | Exception], None]
LONG_TEXT = 20_000  # characters whose tokenization would hold up the event loop


class Observer(Protocol):
    """Who counts what passes."""

    def on_news(self, news: EngineNews) -> None:
        """The engine has brought news."""

    def on_output(self, output: RequestOutput, params: SamplingParams) -> None:
        """A request has got an output."""

    def forget(self, request_id: str) -> None:
        """A request was aborted: no output comes any more."""


@dataclass(slots=True, eq=False)
class Subscription:
    """Who waits for the outputs of a request.

    Attributes:
        deliver: Takes its outputs, the last of which is ``finished``; or one exception, and nothing
            after it. Called on the event loop, so it must not wait.
    """

    request_id: str
    params: SamplingParams
    deliver: Deliver
    num_prompt_tokens: int


class AsyncLLM:
    """A model for the coroutines of one event loop.

    Args:
        client: Of the engine.
        frontend: Tokenizer and outputs.
        observer: Counts what passes; None for nobody.
        runs_in_loop: Whether the client brings its news on the event loop; else they come from
            another thread.
    """

    def __init__(
        self,
        client: EngineClient,
        frontend: Frontend,
        *,
        observer: Observer | None = None,
        runs_in_loop: bool = False,
    ) -> None:
        self.frontend = frontend
        self.observer = observer
        self.stats: SchedulerStats | None = None
        self.dead_error: EngineDeadError | None = None
        self.last_news_time = time.monotonic()
        self.on_death: Callable[[], Any] = lambda: None
        self.client = client
        self._runs_in_loop = runs_in_loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, Subscription] = {}
        self._numbers = itertools.count()
        self._is_stopped = False
        self._resumed = asyncio.Event()
        self._resumed.set()
        client.listen(self._take if runs_in_loop else self._take_from_thread)

    @classmethod
    def from_engine_args(
        cls, engine_args: EngineArgs, *, observer: Observer | None = None, **_: Any
    ) -> "AsyncLLM":
        """Load a model, with its engine on a thread of this process.

        Args:
            engine_args: vLLM's ``AsyncEngineArgs``.
            observer: Counts what passes.
            _: What vLLM's method takes besides (``usage_context``, ``start_engine_loop``, ...).

        Raises:
            ValueError: As ``LLM``.
        """
        # Loads jax, which a front end of an engine elsewhere does without.
        from jaxengine.engine.garbage_collection import exempt_from_garbage_collection
        from jaxengine.engine_loop import EngineLoop
        from jaxengine.loaded_engine import load_engine

        loaded = load_engine(engine_args.create_engine_config())
        loop = EngineLoop(loaded.engine, loaded.info, loaded.new_constraint_factory())
        if loaded.leader is not None:
            loaded.leader.unfinished_requests = lambda: loop.request_ids
        frontend = Frontend(loaded.tokenizer, loaded.info, loaded.chat_template)
        llm = cls(loop.connect(owns_loop=True), frontend, observer=observer)
        exempt_from_garbage_collection(owner=llm)
        return llm

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self.client.info

    @property
    def is_running(self) -> bool:
        """Whether requests can be taken."""
        return not self._is_stopped and self.dead_error is None

    @property
    def is_stopped(self) -> bool:
        """Whether ``shutdown`` was called, or the engine has failed."""
        return not self.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine has failed."""
        return self.dead_error is not None

    @property
    def num_unfinished(self) -> int:
        """Requests whose last output has not come."""
        return len(self._waiting)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of their prompts."""
        return sum(each.num_prompt_tokens for each in self._waiting.values())

    async def check_health(self) -> None:
        """Raise if the engine has failed.

        Raises:
            EngineDeadError: Saying why.
        """
        if self.dead_error is not None:
            raise self.dead_error

    async def get_tokenizer(self, lora_request: Any = None) -> Any:
        """Return the Hugging Face tokenizer."""
        refuse_foreign(lora_request=lora_request)
        return self.frontend.require_tokenizer().hf_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's own sampling parameters."""
        return self.frontend.default_params()

    async def generate(
        self,
        prompt: Prompt | EncodedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt; closing the iterator early aborts the request.

        Args:
            prompt: Text, token ids, or a dict of them.
            sampling_params: None takes the model's defaults.
            request_id: Its name; None makes one.
            lora_request: Must be None.
            tokenization_kwargs: As for ``LLM.generate``.
            trace_headers: Without effect.
            priority: Smaller first; needs ``scheduling_policy="priority"``.
            data_parallel_rank: Without effect: the engine chooses the replica.

        Raises:
            ValueError: If the request is not possible.
            EngineDeadError: If the engine fails.
        """
        del trace_headers, data_parallel_rank
        refuse_foreign(lora_request=lora_request)
        if isinstance(prompt, EncodedPrompt):
            encoded = prompt
        else:
            encoded = await self.encode_prompt(prompt, tokenization_kwargs)
        (params,) = self.frontend.params_for(1, sampling_params)
        await self._resumed.wait()
        arrived: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        waiting = self.submit(encoded, params, arrived.put_nowait, request_id, priority=priority)
        try:
            is_finished = False
            while not is_finished:
                news = await arrived.get()
                if isinstance(news, Exception):
                    raise news
                is_finished = news.finished
                yield news
        finally:
            self.cancel([waiting])

    async def encode_prompt(
        self, prompt: Prompt, tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> EncodedPrompt:
        """Bring a prompt into the form that the engine takes.

        Raises:
            ValueError: If it is not possible.
        """
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if isinstance(text, str) and len(text) > LONG_TEXT:
            encode = self.frontend.encode
            return (await asyncio.to_thread(encode, [prompt], tokenization_kwargs))[0]
        return self.frontend.encode([prompt], tokenization_kwargs)[0]

    def submit(
        self,
        prompt: EncodedPrompt,
        params: SamplingParams,
        deliver: Deliver,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> Subscription:
        """Queue a request whose prompt is encoded and whose parameters are complete.

        Raises:
            ValueError: If it is not possible, or its id is in use.
            EngineDeadError: If the engine has failed.
        """
        self._use_running_loop()
        if self.dead_error is not None:
            raise self.dead_error
        self.frontend.check_length(prompt)
        (priority,) = as_priorities(priority, 1)
        name = f"{next(self._numbers)}" if request_id is None else request_id
        processor = self.frontend.processor
        children = processor.add_request(name, prompt.text, prompt.token_ids.tolist(), params)
        waiting = self._waiting[name] = Subscription(name, params, deliver, len(prompt.token_ids))
        try:
            self.client.add(
                [
                    EngineRequest(
                        child.request_id,
                        prompt.token_ids,
                        child.sampling_params,
                        priority,
                        prompt.cache_salt,
                    )
                    for child in children
                ]
            )
        except BaseException:
            processor.abort(name)
            del self._waiting[name]
            raise
        return waiting

    def cancel(self, subscriptions: Iterable[Subscription]) -> None:
        """Abort requests; nothing happens for those that have ended."""
        children: list[str] = []
        for each in subscriptions:
            if self._waiting.get(each.request_id) is each:
                del self._waiting[each.request_id]
                children += self.frontend.processor.abort(each.request_id)
                if self.observer is not None:
                    self.observer.forget(each.request_id)
        self._abort_children(children)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Abort requests; who waits for them gets a last output with ``finish_reason`` "abort"."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        for name in names:
            waiting = self._waiting.pop(name, None)
            if waiting is not None:
                output, children = self.frontend.processor.end_early(name)
                self._abort_children(children)
                waiting.deliver(output)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all cached prefixes; returns False if requests still run."""
        if reset_running_requests:
            await self.abort(list(self._waiting))
        return bool(await self.call("reset_prefix_cache"))

    async def call(self, method: str, **arguments: Any) -> Any:
        """Have the engine do something between two steps.

        Raises:
            EngineDeadError: If the engine has failed.
            Exception: What the method has raised.
        """
        loop = self._use_running_loop()
        if self.dead_error is not None:
            raise self.dead_error
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any) -> None:
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        def done(result: Any) -> None:
            if self._runs_in_loop:
                settle(result)
            else:
                loop.call_soon_threadsafe(settle, result)

        self.client.call(method, done, **arguments)
        return await future

    async def pause_generation(self, *, wait_for_inflight_requests: bool = False) -> None:
        """Hold further requests back until ``resume_generation``.

        Args:
            wait_for_inflight_requests: Let those that run end; else they are aborted.
        """
        self._resumed.clear()
        if wait_for_inflight_requests:
            await self.wait_for_requests_to_drain()
        else:
            await self.abort(list(self._waiting))

    async def resume_generation(self) -> None:
        """Let requests through again."""
        self._resumed.set()

    async def is_paused(self) -> bool:
        """Whether requests are held back."""
        return not self._resumed.is_set()

    async def wait_for_requests_to_drain(self, drain_timeout: int = 300) -> None:
        """Wait until no request is left.

        Raises:
            TimeoutError: If that takes longer than ``drain_timeout`` seconds.
        """
        deadline = time.monotonic() + drain_timeout
        while self._waiting and self.dead_error is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._waiting)} requests run after {drain_timeout} s")
            await asyncio.sleep(0.02)

    async def do_log_stats(self) -> None:
        """Write the engine's counters to the log."""
        logger.info("%s", self.stats)

    def shutdown(self, timeout: float | None = None) -> None:
        """Abort all requests and leave the engine; one of this process ends."""
        del timeout
        self._is_stopped = True
        self.cancel(list(self._waiting.values()))
        self.client.close()

    def _abort_children(self, child_ids: Sequence[str]) -> None:
        if child_ids and self.dead_error is None:
            with contextlib.suppress(EngineDeadError):
                self.client.abort(child_ids)

    def _use_running_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._waiting and self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("an AsyncLLM serves one event loop at a time")
            self._loop = loop
        return loop

    def _take_from_thread(self, news: EngineNews) -> None:
        if self._loop is None or self._loop.is_closed():
            if news.dead is not None:
                self._take(news)
            return
        with contextlib.suppress(RuntimeError):  # closed in this moment: nobody waits any more
            self._loop.call_soon_threadsafe(self._take, news)

    def _take(self, news: EngineNews) -> None:
        """Turn news of the engine into outputs of requests (on the event loop)."""
        self.last_news_time = time.monotonic()
        processed = self.frontend.processor.process(news.step)
        for stopped in processed.stopped:
            self.client.finish(stopped.request_id, stopped.stop_reason)
        observer = self.observer
        if observer is not None:
            observer.on_news(news)
        for output in processed.request_outputs:
            waiting = self._waiting[output.request_id]
            if output.finished:
                del self._waiting[output.request_id]
            if observer is not None:
                observer.on_output(output, waiting.params)
            waiting.deliver(output)
        if news.stats is not None:
            self.stats = news.stats
        for child_id, reason in news.refused.items():
            self._refuse(child_id, reason)
        if news.failed is not None:
            self._end_all(EngineDeadError(news.failed))
        if news.dead is not None:
            self.dead_error = EngineDeadError(news.dead)
            self._end_all(self.dead_error)
            self.on_death()

    def _refuse(self, child_id: str, reason: str) -> None:
        """End a request of which the engine has refused a part; what runs of it is aborted."""
        name = self.frontend.processor.request_of(child_id)
        if name is None or (waiting := self._waiting.get(name)) is None:
            return
        self.cancel([waiting])
        waiting.deliver(ValueError(reason))

    def _end_all(self, error: EngineDeadError) -> None:
        ended = list(self._waiting.values())
        self._waiting.clear()
        for waiting in ended:
            self.frontend.processor.abort(waiting.request_id)
            waiting.deliver(error)


AsyncLLMEngine = AsyncLLM
