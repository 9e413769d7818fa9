"""Engine: requests of token ids in, sampled token ids out. No text here.

``Engine.step`` is the whole loop: schedule a step, dispatch it, and only then read the tokens of
the one before.
"""

import collections
import dataclasses
import hashlib
import time
from collections.abc import Sequence

from jaxengine.config import ModelConfig
from jaxengine.engine.model_runner import ModelRunner, PendingStep
from jaxengine.engine.request import FinishReason, Request
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.scheduler_output import EngineCoreOutput, SchedulerOutput, SchedulerStats
from jaxengine.sampling_params import SamplingParams

MAX_IN_FLIGHT = 2  # the step on the device, and the one behind it


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one call of ``Engine.step`` brought.

    Attributes:
        outputs: News of requests, in the order of the step's rows.
        step: The finished step, for its logprobs; None if none finished.
    """

    outputs: list[EngineCoreOutput]
    step: PendingStep | None


class Engine:
    """Continuous batching over a scheduler and a model runner.

    Args:
        scheduler: Decides what each step computes.
        runner: Computes it.
        model_config: The model served.
        seed: Base of the seeds of requests that bring none.
        max_in_flight: Steps dispatched before the first one's tokens are read.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        model_config: ModelConfig,
        eos_token_ids: frozenset[int],
        seed: int = 0,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.model_config = model_config
        self.eos_token_ids = eos_token_ids
        self._seed = seed
        self._max_in_flight = max_in_flight
        self._pending: collections.deque[PendingStep] = collections.deque()
        self._in_flight: collections.deque[SchedulerOutput] = collections.deque()

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a request.

        Raises:
            ValueError: If it can never run: the prompt is empty, too long, or holds token ids
                that the model does not have. Nothing has changed then.
        """
        self._check_token_ids(request_id, prompt_token_ids)
        if params.seed is None and not params.is_greedy:
            params = params.clone(seed=derive_seed(self._seed, request_id))
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            sampling_params=params,
            eos_token_ids=self.eos_token_ids,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            priority=priority,
        )
        self.scheduler.add_request(request)
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

    def step(self) -> StepResult:
        """Dispatch the next step, then take in the oldest one that must be read now.

        If the device fails, or the user interrupts, every request ends (what the cache holds is
        no longer known), the error goes on to the caller, and the engine can be used again.
        """
        try:
            scheduled = self.scheduler.schedule()
            if scheduled is not None:
                self._in_flight.append(scheduled)
                self._pending.append(self.runner.execute(scheduled))
                if len(self._pending) < self._max_in_flight:
                    return StepResult([], None)
            if not self._pending:
                return StepResult([], None)
            oldest = self._pending.popleft()
            token_ids = oldest.token_ids()
        except BaseException:
            self._give_up_steps()
            raise
        self._in_flight.popleft()
        return StepResult(
            self.scheduler.update_from_output(oldest.scheduler_output, token_ids), oldest
        )

    def _give_up_steps(self) -> None:
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

    def _check_token_ids(self, request_id: str, token_ids: Sequence[int]) -> None:
        if not len(token_ids):
            return  # the scheduler says it
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.model_config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"request {request_id!r}: token id {bad} is not in the vocabulary of "
                f"{self.model_config.vocab_size}; tokenize with this model's tokenizer"
            )


def derive_seed(engine_seed: int, request_id: str) -> int:
    """Seed of a request that brings none: the same for the same engine seed and id."""
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
