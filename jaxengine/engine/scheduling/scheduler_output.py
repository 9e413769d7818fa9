"""What goes into and comes out of the scheduler: rows of a step, news of requests, stats."""

from dataclasses import dataclass
from typing import Any

from jaxengine.engine.scheduling.request import FinishReason, Request


@dataclass(slots=True)
class ScheduledRow:
    """The part of one request that one step computes.

    Attributes:
        request: Whose tokens; read its ``slot``, ``block_ids`` and ``all_token_ids`` before
            the scheduler is called again.
        num_scheduled_tokens: Tokens computed in this step.
        num_computed_tokens: Tokens computed before this step: the first one's position.
        samples_token: Whether the row reaches the end of its tokens, so that the step
            samples the next one. False inside a chunked prompt.
        is_token_on_device: Whether the value of the row's only token is not known on the
            host: the step reads it from ``last_tokens[slot]``.
    """

    request: Request
    num_scheduled_tokens: int
    num_computed_tokens: int
    samples_token: bool
    is_token_on_device: bool


@dataclass(slots=True)
class SchedulerOutput:
    """One step: what the device shall compute.

    Attributes:
        step_id: 0, 1, 2, ... in the order of ``schedule`` and of the device.
        rows: Rows of one token first, then the longer ones. Never empty.
        num_decode_rows: How many rows have one token.
        num_scheduled_tokens: Tokens of all rows.
        new_block_entries: (slot, first block index, block ids) to be written into the
            device's block table before the step; all blocks of an admitted request.
        admitted: Requests that got a slot in this step, for the first time or again:
            whatever the device keeps for a slot must be set up for them.
        preempted: Requests that lost their slot and blocks in this step.
    """

    step_id: int
    rows: list[ScheduledRow]
    num_decode_rows: int
    num_scheduled_tokens: int
    new_block_entries: list[tuple[int, int, list[int]]]
    admitted: list[Request]
    preempted: list[Request]


@dataclass(slots=True)
class EngineCoreOutput:
    """What a step brought for one request.

    Attributes:
        request_id: Which request.
        new_token_ids: Tokens sampled, in order.
        finish_reason: Set if the request has ended.
        stop_reason: The user's stop token that ended it, else None.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        row_index: Row of the step.
        logprobs: ``LogprobRows`` with a row a new token; None if the request wants none.
        first_scheduled_time: When the request first ran, with its first tokens; else None.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_cached_tokens: int
    row_index: int
    logprobs: Any = None
    first_scheduled_time: float | None = None


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """State of the scheduler, for metrics. Counters run from the start.

    Attributes:
        num_running: Requests that hold blocks.
        num_waiting: Requests that wait, preempted ones included.
        num_held_blocks: Blocks in use, each counted once however many share it.
        num_usable_blocks: Blocks there are.
        kv_waste: Of the token slots in held blocks, the fraction not used now.
        kv_waste_average: The same over all steps so far, each weighted by its slots.
        prefix_cache_queries: Prompt tokens looked up.
        prefix_cache_hits: Prompt tokens found, and so not computed.
        num_preemptions: How often a request lost its blocks.
    """

    num_running: int
    num_waiting: int
    num_held_blocks: int
    num_usable_blocks: int
    kv_waste: float
    kv_waste_average: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int

    @property
    def kv_cache_usage(self) -> float:
        """Fraction of the blocks in use."""
        return self.num_held_blocks / self.num_usable_blocks
