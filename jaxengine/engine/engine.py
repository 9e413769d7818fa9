"""Engine: requests of token ids in, sampled token ids out. No text here.

``Engine.step`` is the whole loop: schedule a step, dispatch it, and only then read the tokens of
the one before.
"""

import collections
import hashlib
import time
from array import array
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from jaxengine.engine.device.model_runner import ModelRunner, PendingStep
from jaxengine.engine.scheduling.request import FinishReason, Request, token_id_outside
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import (
    EngineCoreOutput,
    SchedulerOutput,
    SchedulerStats,
)
from jaxengine.engine.step_news import LogprobRows, PromptLogprobs, StepNews
from jaxengine.engine.token_masks import TokenMasks
from jaxengine.model_config import ModelConfig
from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.constraint import TokenConstraint


class Engine:
    """Continuous batching over a scheduler and a model runner.

    Args:
        scheduler: Decides what each step computes.
        runner: Computes it.
        model_config: The model served.
        seed: Base of the seeds of requests that bring none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        model_config: ModelConfig,
        eos_token_ids: frozenset[int],
        seed: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.model_config = model_config
        self.eos_token_ids = eos_token_ids
        self._seed = seed
        self._pending: collections.deque[PendingStep] = collections.deque()
        self._in_flight: collections.deque[SchedulerOutput] = collections.deque()
        self._masks: TokenMasks | None = None  # until a request has a constraint

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        constraint: TokenConstraint | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            request_id: Unique among the unfinished requests.
            prompt_token_ids: The prompt.
            params: How to sample and when to stop.
            arrival_time: Seconds, any clock; None for now.
            priority: Smaller runs first, with the priority policy.
            constraint: Says which tokens may come next; this request's own. None for all.
            cache_salt: Cached blocks are shared only with requests of the same salt.

        Raises:
            ValueError: If it can never run: the prompt is empty, too long, or holds token ids
                that the model does not have. Nothing has changed then.
        """
        if params.seed is None and not params.is_greedy:
            params = params.with_seed(derive_seed(self._seed, request_id))
        request = Request(
            request_id=request_id,
            prompt_token_ids=array("i", prompt_token_ids)
            if isinstance(prompt_token_ids, array)
            else list(prompt_token_ids),
            sampling_params=params,
            eos_token_ids=self.eos_token_ids,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            priority=priority,
            constraint=constraint,
            cache_salt=cache_salt,
        )
        self._check_token_ids(request)
        self.scheduler.add_request(request)
        if constraint is not None and self._masks is None:
            self._masks = TokenMasks(self.model_config.vocab_size)
        return request

    def abort(self, request_id: str) -> None:
        """End a request at once; its tokens in flight are dropped."""
        self.scheduler.abort(request_id)

    def finish(self, request_id: str, stop_reason: int | str | None) -> None:
        """End a request because its text holds a stop string."""
        self.scheduler.finish(request_id, FinishReason.STOP, stop_reason)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs, or a step is in flight."""
        return self.scheduler.has_unfinished_requests or bool(self._pending)

    def step(self) -> StepNews:
        """Dispatch what can run, then take in the oldest step.

        If the device fails, or the user interrupts, every request ends (what the cache holds is
        no longer known), the error goes on to the caller, and the engine can be used again.
        """
        try:
            self.dispatch()
            if not self._pending:
                return StepNews()
            oldest, token_ids = self.read()
        except BaseException:
            self.give_up_steps()
            raise
        return self.take_in(oldest, token_ids)

    def dispatch(self) -> None:
        """Dispatch what can run, up to the limit of steps in flight.

        Never waits, unless a request has a constraint: then, behind a step's forward, for the
        tokens that its masks depend on.
        """
        while (scheduled := self.scheduler.schedule()) is not None:
            self._in_flight.append(scheduled)
            if self._masks is None:
                self._pending.append(self.runner.execute(scheduled))
            else:
                self._pending.append(self.runner.execute(scheduled, self._fill_masks))

    @property
    def has_pending_steps(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._pending)

    @property
    def is_ready(self) -> bool:
        """Whether a step is in flight and ``read`` would not wait for it."""
        if not self._pending:
            return False
        return self._pending[0].sampled.token_ids.is_ready()  # type: ignore[attr-defined]

    def read(self) -> tuple[PendingStep, np.ndarray]:
        """Wait for the oldest step in flight; return it with its token ids."""
        oldest = self._pending.popleft()
        return oldest, oldest.token_ids()

    def take_in(self, step: PendingStep, token_ids: np.ndarray) -> StepNews:
        """Give the scheduler the tokens of a step that was read."""
        self._in_flight.popleft()
        outputs = self.scheduler.update_from_output(step.scheduler_output, token_ids)
        if self._masks is not None and self._masks.broken:
            self._abort_broken(outputs, self._masks.broken)
        return StepNews(outputs, _read_logprobs(step, outputs))

    def give_up_steps(self) -> None:
        """End all requests and forget the steps in flight, whose results never come."""
        self.scheduler.abort_all()
        while self._in_flight:
            step = self._in_flight.popleft()
            self.scheduler.update_from_output(step, [0] * len(step.rows))
        self._pending.clear()
        self.scheduler.block_pool.reset_prefix_cache()
        self.runner.restore_state()

    def stats(self) -> SchedulerStats:
        """Counters of the scheduler and the KV cache."""
        return self.scheduler.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if requests still run."""
        return self.scheduler.block_pool.reset_prefix_cache()

    def _fill_masks(self, step: SchedulerOutput, num_masks: int) -> np.ndarray:
        assert self._masks is not None
        return self._masks.fill(step, num_masks, self._pending)

    def _abort_broken(self, outputs: list[EngineCoreOutput], broken: dict[str, str]) -> None:
        """End requests whose constraint has failed, with the reason."""
        for output in outputs:
            reason = broken.pop(output.request_id, None)
            if reason is not None and output.finish_reason is not FinishReason.LENGTH:
                self.scheduler.finish(output.request_id, FinishReason.ABORT, reason)
                output.finish_reason, output.stop_reason = FinishReason.ABORT, reason

    def _check_token_ids(self, request: Request) -> None:
        bad = token_id_outside(request.all_token_ids, self.model_config.vocab_size)
        if bad is not None:
            raise ValueError(
                f"request {request.request_id!r}: token id {bad} is not in the vocabulary of "
                f"{self.model_config.vocab_size}; tokenize with this model's tokenizer"
            )


def _read_logprobs(step: PendingStep, outputs: Sequence[EngineCoreOutput]) -> list[PromptLogprobs]:
    """Give each output the logprobs of its tokens; return those of prompts."""
    if (arrays := step.logprobs()) is not None:
        rows = step.scheduler_output.rows
        for output in outputs:
            index = output.row_index
            if rows[index].request.sampling_params.num_logprobs is not None:
                output.logprobs = LogprobRows.of(cast(Any, arrays), slice(index, index + 1))
    chunks = [] if step.prompt_scores is None else step.prompt_scores.on_host()
    return [
        PromptLogprobs(chunk.request_id, chunk.start, LogprobRows(*cast(Any, arrays)))
        for chunk, arrays in chunks
    ]


def derive_seed(engine_seed: int, request_id: str) -> int:
    """Seed of a request that brings none: the same for the same engine seed and id."""
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
