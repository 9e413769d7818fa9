"""RequestLoop: the requests of many callers on one engine, each of whom may step it for all."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxengine.engine.garbage_collection import paused_garbage_collection
from jaxengine.engine.step_news import StepNews
from jaxengine.fair_lock import FairLock
from jaxengine.interrupts import interrupts_deferred
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.constraint import TokenConstraint
from jaxengine.text.output_processor import OutputProcessor
from jaxengine.text.prompts import EncodedPrompt

# What has come for one caller: outputs, or the error that has ended its requests.
Inbox = collections.deque[RequestOutput | BaseException]


class NewRequest(NamedTuple):
    """What a caller asks for.

    Attributes:
        prompt: Checked.
        params: Checked.
        priority: Smaller runs first, with the priority policy.
        new_constraint: Makes the constraint of each of its outputs.
    """

    prompt: EncodedPrompt
    params: SamplingParams
    priority: int
    new_constraint: Callable[[], TokenConstraint | None] = lambda: None


class RequestLoop:
    """Queues requests, steps the engine, and gives every caller its own outputs.

    Any thread may call. There is no thread of its own: a caller that waits for an output steps the
    engine for all, and they take turns.

    Args:
        engine: An ``Engine`` or a ``ReplicaGroup``.
        processor: Makes outputs of its tokens.

    Attributes:
        lock: Held for every use of engine and processor.
        num_finished_tokens: Of the requests that have ended: "prompt" and "generation".
    """

    def __init__(self, engine: Any, processor: OutputProcessor) -> None:
        self.engine = engine
        self.processor = processor
        self.lock = FairLock()
        self.num_finished_tokens = collections.Counter[str]()
        self._numbers = itertools.count()
        self._inboxes: dict[str, Inbox] = {}

    @property
    def request_ids(self) -> list[str]:
        """The requests whose outputs are still to come."""
        return list(self._inboxes)

    def add(
        self,
        requests: Sequence[NewRequest],
        inbox: Inbox | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[list[str], Inbox]:
        """Queue all requests, or none of them if one is refused.

        Args:
            requests: What is asked for.
            inbox: Where their outputs are put; None makes a new one.
            names: Their request ids; None makes them.

        Returns:
            Their request ids, and the inbox.

        Raises:
            ValueError: If a request can never run, or its id is in use.
        """
        inbox = collections.deque() if inbox is None else inbox
        with self.lock:
            names = self._new_names(len(requests)) if names is None else names
            for name in names:
                if name in self._inboxes:
                    raise ValueError(f"request id {name!r} is in use; choose another")
            try:
                for name, request in zip(names, requests, strict=True):
                    self._inboxes[name] = inbox
                    self._add(name, request)
            except BaseException:
                self.abort(names)
                raise
        return list(names), inbox

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; those that are not known are left out."""
        with self.lock:
            for request_id in request_ids:
                self._inboxes.pop(request_id, None)
                for child_id in self.processor.abort(request_id):
                    self.engine.abort(child_id)

    def outputs_of(self, request_ids: Sequence[str], inbox: Inbox) -> Iterator[RequestOutput]:
        """Step until these are finished; leaving earlier, for whatever reason, aborts them."""
        num_unfinished = len(request_ids)
        try:
            while num_unfinished:
                output = self._next_output(inbox)
                num_unfinished -= output.finished
                yield output
        finally:
            self.abort(request_ids)

    def step(self, inbox: Inbox) -> list[RequestOutput]:
        """Run one step, unless the inbox holds news already; empty it and return what it held.

        If it raises, the requests of this inbox are to be aborted.
        """
        with self.lock:
            if not inbox:
                with interrupts_deferred():
                    self._step(inbox)
            news = list(inbox)
            inbox.clear()
            outputs = [each for each in news if isinstance(each, RequestOutput)]
            for output in outputs:
                if output.finished:
                    del self._inboxes[output.request_id]
        for each in news:
            if isinstance(each, BaseException):
                raise each
        return outputs

    def run_empty(self) -> None:
        """Abort every request, and wait for the steps in flight."""
        with self.lock:
            self.abort(self.request_ids)
            while self.engine.has_unfinished_requests:
                self.engine.step()

    def _new_names(self, count: int) -> list[str]:
        names = (str(number) for number in self._numbers)
        return list(itertools.islice((n for n in names if n not in self._inboxes), count))

    def _add(self, request_id: str, request: NewRequest) -> None:
        text, token_ids, cache_salt = request.prompt
        children = self.processor.add_request(request_id, text, token_ids.tolist(), request.params)
        for child in children:
            self.engine.add_request(
                child.request_id,
                token_ids,
                child.sampling_params,
                priority=request.priority,
                constraint=request.new_constraint(),
                cache_salt=cache_salt,
            )

    def _next_output(self, inbox: Inbox) -> RequestOutput:
        while not inbox:
            with self.lock:  # each step anew, so that those who wait get their turn
                if inbox:
                    break
                with interrupts_deferred():
                    if not self.engine.has_unfinished_requests:
                        raise RuntimeError(
                            "a request ended without an output: it was aborted elsewhere"
                        )
                    self._step(inbox)
        news = inbox.popleft()
        if isinstance(news, BaseException):
            raise news
        return news

    @paused_garbage_collection()  # what a step makes is gone when it returns
    def _step(self, own: Inbox) -> None:
        """Run one step of the engine; put the outputs that it changed into their inboxes.

        If it fails, every request has ended: the caller gets the error itself, and the inboxes of
        all others one that names it.
        """
        try:
            self._process(self.engine.step())
        except BaseException as error:
            for inbox in {id(each): each for each in self._inboxes.values()}.values():
                if inbox is not own:
                    failure = RuntimeError(f"a step of the engine has failed: {error!r}")
                    failure.__cause__ = error
                    inbox.append(failure)
            raise

    def _process(self, news: StepNews) -> None:
        processed = self.processor.process(news)
        for stopped in processed.stopped:
            self.engine.finish(stopped.request_id, stopped.stop_reason)
        for output in processed.request_outputs:
            self._inboxes[output.request_id].append(output)
            if output.finished:
                self._count(output)

    def _count(self, output: RequestOutput) -> None:
        counts = self.num_finished_tokens
        counts["prompt"] += len(output.prompt_token_ids)
        if output.metrics is not None:
            counts["generation"] += output.metrics.num_generation_tokens
