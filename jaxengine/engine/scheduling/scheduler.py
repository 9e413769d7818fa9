"""The scheduler: what the next step of the device computes.

There is no prefill and no decode phase. Each request has ``num_computed_tokens`` and
tokens; a step gives requests tokens to compute, as far as the token budget, the blocks
and the slots go, so that computed tokens catch up with the tokens there are. Long
prompts, chunks, decoding, a prefix-cache hit and recomputation are all the same.

Asynchronous by design: ``schedule`` may be called again before the tokens sampled by
earlier steps are known. A token that has been sampled but not read is a placeholder: it
can be computed by the next step (its value is in ``last_tokens[slot]`` on the device)
but not hashed or compared. Why nothing has to wait for the device:

* The device runs steps in the order of ``step_id``. Blocks taken from a request go to
  another one in a later step, so a step in flight reads and writes them before that.
* A slot is given away only by a later step, too. A late step of the old owner writes
  ``last_tokens[slot]`` before any step of the new owner runs, and the new owner reads it
  only after one of its own steps has sampled into it. The same holds for the block table.
* Host-side results carry the request, not the slot: a late token is dropped if its
  request has ended, and kept if it was merely preempted (it was computed correctly).
* A stop token is noticed up to ``max_in_flight - 1`` steps late. The extra steps write
  behind the last token, never into a block known to the prefix cache.
"""

import time
from bisect import insort
from collections.abc import Sequence

import numpy as np

from jaxengine.engine.scheduling.block_allocator import BlockAllocator
from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.request import NO_SLOT, FinishReason, Request, RequestStatus
from jaxengine.engine.scheduling.request_limits import RequestLimits
from jaxengine.engine.scheduling.request_queue import (
    FCFSQueue,
    PriorityQueue,
    RequestQueue,
    scheduling_key,
)
from jaxengine.engine.scheduling.scheduler_output import (
    EngineCoreOutput,
    SchedulerOutput,
    SchedulerStats,
)
from jaxengine.engine.scheduling.step_budget import fitted_budget
from jaxengine.engine.scheduling.step_builder import StepBuilder

POLICIES = ("fcfs", "priority")


class Scheduler:
    """Decides, step by step, which tokens of which requests are computed.

    Owns the requests, their slots and (through the pool) their blocks; knows nothing of
    text, of sampling, or of the device.

    Args:
        block_pool: The KV blocks.
        max_num_seqs: Most requests that run at once: the number of slots.
        max_num_batched_tokens: Token budget of a step.
        max_model_len: Longest request, prompt and output.
        enable_chunked_prefill: Whether a prompt may be computed in several steps.
        long_prefill_token_threshold: Most tokens of one request in one step, so that a long
            prompt does not delay the others; 0 means no limit.
        policy: "fcfs" (first come, first served) or "priority" (smallest first). Blocks
            are taken from the request that is last in this order. A waiting request never
            takes a slot or blocks from a running one.
        watermark: Fraction of the blocks kept free when a request is admitted beside
            others, so that these can grow; at least one block a running request.
        max_in_flight: How many steps may be scheduled whose results are not known; 1 is
            synchronous.
        num_stages: Pipeline stages. With several, the requests that decode take turns in as many
            groups of about the same size: a request whose token is still in the pipeline rests, so
            that the stages work at the same time.
        sliding_window: Window of every layer; None if any layer sees all tokens.
        step_sizes: Sizes that long steps are padded to, rising; a step that would fill little more
            than one of them leaves the rest to the next step.
        can_raise_max_model_len: Whether the model could read longer requests: errors say so.

    Raises:
        ValueError: If a limit is impossible or contradicts another.
    """

    def __init__(
        self,
        *,
        block_pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        policy: str = "fcfs",
        watermark: float = 0.01,
        max_in_flight: int = 2,
        num_stages: int = 1,
        sliding_window: int | None = None,
        step_sizes: Sequence[int] = (),
        can_raise_max_model_len: bool = True,
    ) -> None:
        _require_at_least_one(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_in_flight=max_in_flight,
            num_stages=num_stages,
            sliding_window=1 if sliding_window is None else sliding_window,
        )
        if policy not in POLICIES:
            raise ValueError(f"scheduling policy is {policy!r}; choose one of {POLICIES}")
        if long_prefill_token_threshold < 0:
            raise ValueError(
                f"long_prefill_token_threshold is {long_prefill_token_threshold}; "
                f"0 turns it off, and it cannot be negative"
            )
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is {watermark}; it is a fraction in [0, 1)")
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens is {max_num_batched_tokens}, less than max_model_len "
                f"({max_model_len}), so a long prompt could never run without chunked prefill; "
                f"raise --max-num-batched-tokens, lower --max-model-len, or enable chunked prefill"
            )
        self.block_pool = block_pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.policy = policy
        self.max_in_flight = max_in_flight
        self.num_stages = num_stages
        self._step_sizes = tuple(step_sizes) if enable_chunked_prefill else ()
        self._is_prefilling = False  # whether the last step left a prompt unfinished
        self._max_chunk_tokens = max_num_batched_tokens
        if enable_chunked_prefill and long_prefill_token_threshold:
            self._max_chunk_tokens = min(long_prefill_token_threshold, max_num_batched_tokens)
        self._watermark_blocks = int(watermark * block_pool.num_usable_blocks)
        self._blocks = BlockAllocator(block_pool, self._max_chunk_tokens, sliding_window)

        self._limits = RequestLimits(
            max_model_len=max_model_len,
            max_computed_tokens=self._blocks.max_tokens_per_request,
            block_pool=block_pool,
            can_be_raised=can_raise_max_model_len,
        )

        self._requests: dict[str, Request] = {}
        self._waiting: RequestQueue = FCFSQueue() if policy == "fcfs" else PriorityQueue()
        # In the order of scheduling, so the victim of a preemption is the last one and has
        # no row yet. May hold finished requests until the next step.
        self._running: list[Request] = []
        self._has_finished_running = False
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))  # a stack: slot 0 goes first

        self._num_scheduled_steps = 0
        self._num_updated_steps = 0
        self._num_preemptions = 0
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._unused_slot_steps = 0
        self._held_slot_steps = 0

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return self.max_num_seqs - len(self._free_slots)

    @property
    def num_waiting(self) -> int:
        """Requests that do not, preempted ones included."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled whose results have not come back."""
        return self._num_scheduled_steps - self._num_updated_steps

    def add_request(self, request: Request) -> None:
        """Put a new request into the queue.

        A request that would outgrow the pool even alone ends there, with
        ``FinishReason.LENGTH``, as at the model's limit: the last token sampled needs no K/V.

        Raises:
            ValueError: If the request can never run. Nothing has changed then.
        """
        if request.request_id in self._requests:
            raise ValueError(
                f"request_id {request.request_id!r} is in use by an unfinished request; choose "
                f"another or abort that one"
            )
        request.max_num_tokens = self._limits.max_num_tokens(request)
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at once.

        Returns:
            The request; None if there is none of this id, or no longer.
        """
        return self.finish(request_id, FinishReason.ABORT)

    def finish(
        self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None
    ) -> Request | None:
        """End a request for a reason found elsewhere, such as a stop string in its text.

        Tokens of it that are in flight will be dropped.

        Returns:
            The request; None if there is none of this id, or no longer.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, reason, stop_reason)
        return request

    def abort_all(self) -> None:
        """End every request at once; their tokens in flight will be dropped."""
        for request_id in list(self._requests):
            self.abort(request_id)

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt whose K/V fit when a request has the pool alone."""
        return self._limits.max_computed_tokens

    def schedule(self) -> SchedulerOutput | None:
        """Choose the next step and count its tokens as computed.

        Every output must be run on the device, in order, and then be given to
        ``update_from_output``, in order, even if its requests have been aborted.

        Returns:
            The step; None if nothing can run now: no request, too many steps in flight, or
            requests whose last token is in flight.
        """
        if self.num_in_flight >= self.max_in_flight:
            return None
        if self._has_finished_running:
            self._running = [r for r in self._running if r.status is RequestStatus.RUNNING]
            self._has_finished_running = False
        step = StepBuilder(self._token_budget())
        self._schedule_running(step, self.num_stages)
        if not step.is_out_of_blocks:
            self._schedule_waiting(step)
        num_stages = self.num_stages
        while step.is_empty and num_stages > 1:
            # Better a step that waits in the pipeline than one that waits for the host as well:
            # wake the request that has rested longest.
            num_stages -= 1
            self._schedule_running(step, num_stages)
        if step.is_empty:
            return None
        return self._close_step(step)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, token_ids: Sequence[int] | np.ndarray
    ) -> list[EngineCoreOutput]:
        """Take in the tokens a step has sampled.

        Args:
            scheduler_output: The oldest step in flight.
            token_ids: One for each row; ignored where ``samples_token`` is False.

        Returns:
            News of the requests that got a token, in the order of the rows.
        """
        assert scheduler_output.step_id == self._num_updated_steps, "steps come back in order"
        assert len(token_ids) == len(scheduler_output.rows), "one token a row"
        self._num_updated_steps += 1
        tokens = token_ids.tolist() if isinstance(token_ids, np.ndarray) else token_ids
        outputs = []
        for row_index, row in enumerate(scheduler_output.rows):
            request = row.request
            if not row.samples_token or request.status is RequestStatus.FINISHED:
                continue
            token_id = tokens[row_index]
            request.num_output_placeholders -= 1  # the oldest one becomes a token
            is_first = not request.output_token_ids
            request.append_output_token(token_id)
            reason, stop_reason = request.find_stop() or (None, None)
            if reason is not None:
                self._finish(request, reason, stop_reason)
            outputs.append(
                EngineCoreOutput(
                    request.request_id,
                    [token_id],
                    reason,
                    stop_reason,
                    request.num_cached_tokens,
                    row_index,
                    first_scheduled_time=request.first_scheduled_time if is_first else None,
                )
            )
        return outputs

    def stats(self) -> SchedulerStats:
        """Return the metrics of this moment."""
        num_held_blocks = self.block_pool.num_held_blocks
        num_held_slots = num_held_blocks * self.block_pool.block_size
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_held_blocks=num_held_blocks,
            num_usable_blocks=self.block_pool.num_usable_blocks,
            kv_waste=self._blocks.num_unused_slots / max(1, num_held_slots),
            kv_waste_average=self._unused_slot_steps / max(1, self._held_slot_steps),
            prefix_cache_queries=self._prefix_cache_queries,
            prefix_cache_hits=self._prefix_cache_hits,
            num_preemptions=self._num_preemptions,
        )

    def check_integrity(self) -> None:
        """Check that blocks and slots are held exactly by the running requests.

        Raises:
            AssertionError: Saying what is wrong.
        """
        running = [r for r in self._requests.values() if r.status is RequestStatus.RUNNING]
        assert len(running) + self.num_waiting == len(self._requests), "a request is lost"
        slots = sorted(self._free_slots + [request.slot for request in running])
        assert slots == list(range(self.max_num_seqs)), "a slot is lost or used twice"
        self.block_pool.check_integrity([r.block_ids[r.num_dead_blocks :] for r in running])
        num_reserved = sum(request.num_reserved_blocks for request in running)
        assert num_reserved == self._blocks.num_reserved_blocks, "reserved blocks miscounted"
        block_size = self.block_pool.block_size
        num_unused = sum(len(r.block_ids) * block_size - r.num_computed_tokens for r in running)
        assert num_unused == self._blocks.num_unused_slots, "unused slots miscounted"

    def _token_budget(self) -> int:
        """Return the tokens of the next step at most, with a look at what it would be padded to."""
        if not self._step_sizes or not (self._is_prefilling or len(self._waiting)):
            return self.max_num_batched_tokens
        counts = [r.num_tokens_with_placeholders - r.num_computed_tokens for r in self._running]
        prefills = [min(count, self._max_chunk_tokens) for count in counts if count > 1]
        num_decodes, num_prefill_tokens = len(counts) - len(prefills), sum(prefills)
        for request in self._waiting:
            if num_prefill_tokens >= self.max_num_batched_tokens:
                break
            num_prefill_tokens += min(request.num_tokens, self._max_chunk_tokens)
        fitted = fitted_budget(
            self._step_sizes, num_decodes=num_decodes, num_prefill_tokens=num_prefill_tokens
        )
        return fitted or self.max_num_batched_tokens

    def _schedule_running(self, step: StepBuilder, num_stages: int) -> None:
        # A request whose newest token comes from a step that may not be through rests.
        first_in_pipeline = self._num_scheduled_steps - num_stages + 1
        first_resting = max(first_in_pipeline, self._num_updated_steps)
        most_decode_rows = -(-len(self._running) // self.num_stages)
        block_size = self.block_pool.block_size
        for request in self._running:  # may lose requests from its end while we go
            num_tokens = request.num_tokens_with_placeholders
            if num_tokens >= request.max_num_tokens:
                continue  # its last token is in flight
            if request.last_sampling_step >= first_resting:
                continue
            num_computed = request.num_computed_tokens
            is_decode = num_tokens - num_computed == 1
            if is_decode and len(step.decode_rows) == most_decode_rows:
                continue  # the next group
            num_new = self._chunk(num_tokens - num_computed, step.budget)
            if num_new == 0:
                break
            is_full = num_computed + num_new > len(request.block_ids) * block_size
            if is_full and not self._make_room(request, num_new, step):
                break
            self._add_row(request, num_new, step)

    def _schedule_waiting(self, step: StepBuilder) -> None:
        while len(self._waiting) and self._free_slots and step.budget:
            request = self._waiting.peek()
            if request.num_output_placeholders:
                return  # preempted; what it computes next depends on tokens in flight
            if not self._admit(request, step):
                return

    def _admit(self, request: Request, step: StepBuilder) -> bool:
        """Give a waiting request a slot and its first row, if there is room."""
        num_spare = max(self._watermark_blocks, self.num_running) if self.num_running else 0
        if self._blocks.num_unreserved_blocks <= num_spare:
            return False  # without looking for its prefix: at least one block will be new
        cached = self._blocks.find_cached_prefix(request)
        num_cached_tokens = len(cached) * self.block_pool.block_size
        num_new = self._chunk(request.num_tokens - num_cached_tokens, step.budget)
        if num_new == 0 or not self._blocks.can_admit(request, cached, num_spare):
            return False
        self._waiting.remove(request)
        self._blocks.admit(request, cached)
        self._count_prefix_hit(request, num_cached_tokens)
        self._start_running(request, step)
        new_block_ids = self._blocks.grow(request, num_cached_tokens + num_new)
        assert new_block_ids is not None, "can_admit promised these blocks"
        step.new_block_entries.append((request.slot, 0, list(request.block_ids)))
        self._add_row(request, num_new, step)
        return True

    def _start_running(self, request: Request, step: StepBuilder) -> None:
        request.status = RequestStatus.RUNNING
        request.first_scheduled_time = request.first_scheduled_time or time.time()
        request.slot = self._free_slots.pop()
        step.admitted.append(request)
        if self.policy == "priority":
            insort(self._running, request, key=scheduling_key)
        else:
            self._running.append(request)

    def _count_prefix_hit(self, request: Request, num_cached_tokens: int) -> None:
        if request.num_preemptions or not self.block_pool.enable_prefix_caching:
            return  # what a request finds of its own is no hit
        if request.reads_prefix_cache:
            request.num_cached_tokens = num_cached_tokens
            self._prefix_cache_queries += request.num_tokens
            self._prefix_cache_hits += num_cached_tokens

    def _chunk(self, num_tokens: int, budget: int) -> int:
        """Return how many of these tokens the step takes; 0 for none."""
        if num_tokens > budget and not self.enable_chunked_prefill:
            return 0
        return min(num_tokens, budget, self._max_chunk_tokens)

    def _make_room(self, request: Request, num_new: int, step: StepBuilder) -> bool:
        """Get blocks for a running request, from those behind it if need be.

        The last request preempts nobody, itself included: it keeps what it has and waits
        until others end or take its blocks. The first one always gets its blocks, so the
        queue moves.
        """
        num_tokens = request.num_computed_tokens + num_new
        first_index = len(request.block_ids)
        while (new_block_ids := self._blocks.grow(request, num_tokens)) is None:
            step.is_out_of_blocks = True
            if self._running[-1] is request:
                return False
            self._preempt_last(step)
        step.new_block_entries.append((request.slot, first_index, new_block_ids))
        return True

    def _preempt_last(self, step: StepBuilder) -> None:
        request = self._running.pop()
        self._stop_running(request, RequestStatus.PREEMPTED)
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.put_back(request)
        step.preempted.append(request)

    def _add_row(self, request: Request, num_new: int, step: StepBuilder) -> None:
        step.add_row(request, num_new)
        self._blocks.num_unused_slots -= num_new
        self._blocks.cache_full_blocks(request)

    def _close_step(self, step: StepBuilder) -> SchedulerOutput:
        self._unused_slot_steps += self._blocks.num_unused_slots
        self._held_slot_steps += self.block_pool.num_held_blocks * self.block_pool.block_size
        self._is_prefilling = step.has_unfinished_prompts
        scheduled = step.build(self._num_scheduled_steps)
        self._num_scheduled_steps += 1
        for row in scheduled.rows if self.num_stages > 1 else ():
            if row.samples_token:
                row.request.last_sampling_step = scheduled.step_id
        return scheduled

    def _finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None
    ) -> None:
        del self._requests[request.request_id]
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request, RequestStatus.FINISHED)
            self._has_finished_running = True
        else:
            self._waiting.remove(request)
            request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def _stop_running(self, request: Request, status: RequestStatus) -> None:
        """Take blocks and slot from a request; the caller takes it off the list."""
        self._blocks.release(request)
        self._free_slots.append(request.slot)
        request.slot = NO_SLOT
        request.status = status


def _require_at_least_one(**limits: int) -> None:
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
