"""A request and its life cycle, as counters.

Nothing here says "prefill" or "decode": a request has tokens, some of them computed
(their K/V are in the cache, or will be when the steps already dispatched have run),
and the scheduler makes ``num_computed_tokens`` catch up with the tokens there are.

Only the scheduler changes a request; everybody else reads.
"""

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxengine.sampling_params import SamplingParams

NO_SLOT = -1


class RequestStatus(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"  # never run, holds nothing
    RUNNING = "running"  # holds blocks and a slot
    PREEMPTED = "preempted"  # ran, lost its blocks, waits to be computed again
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended; the values are those of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(eq=False, repr=False, kw_only=True, slots=True)
class Request:
    """A prompt, what has been generated for it, and where it lives in the KV cache.

    Tokens are numbered over prompt and output together::

        0 ........ num_computed_tokens .... num_tokens .... num_tokens_with_placeholders
        K/V written or dispatched | known, not yet run | sampled, value only on the device

    With asynchronous scheduling ``num_computed_tokens`` may pass ``num_tokens``: a step
    may compute a token before the host has learnt its value.

    Args:
        request_id: Unique among the unfinished requests.
        prompt_token_ids: The prompt. Kept, not copied.
        sampling_params: How to sample and when to stop.
        eos_token_ids: The model's end tokens; they end the output unless ``ignore_eos``.
        arrival_time: Seconds, any clock; breaks ties of priority.
        priority: Smaller runs first. Used by the priority policy only.
        cache_salt: Requests share cached blocks only with requests of the same salt.
        constraint: Says which tokens may come next (a ``TokenConstraint``); None for all.

    Raises:
        ValueError: If a token id of the prompt is not an integer of 32 bits.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time: float = 0.0
    priority: int = 0
    cache_salt: str | None = None
    constraint: Any = None

    output_token_ids: list[int] = field(default_factory=list, init=False)
    # Prompt and output known on the host: 4 bytes a token, so that hashing a block and
    # filling the step's input array are copies of memory instead of loops.
    all_token_ids: "array[int]" = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)  # the user's, and the model's
    max_num_tokens: int = field(default=0, init=False)  # prompt and output; set by the scheduler

    num_computed_tokens: int = field(default=0, init=False)
    num_output_placeholders: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)  # prompt tokens found in the cache
    num_preemptions: int = field(default=0, init=False)
    first_scheduled_time: float | None = field(default=None, init=False)  # of time.time
    last_sampling_step: int = field(default=-1, init=False)  # kept with pipeline stages only

    slot: int = field(default=NO_SLOT, init=False)  # row of the device-side state
    block_ids: list[int] = field(default_factory=list, init=False)
    num_dead_blocks: int = field(default=0, init=False)  # leading ones, outside the window
    num_reserved_blocks: int = field(default=0, init=False)  # promised at admission
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    num_cacheable_blocks: int = field(default=0, init=False)  # leading ones, offered to the cache

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Derive the token array and the tokens that end the output."""
        self.all_token_ids = _token_array(self.request_id, self.prompt_token_ids)
        stop_token_ids = self.sampling_params.all_stop_token_ids
        if not self.sampling_params.ignore_eos:
            stop_token_ids |= self.eos_token_ids
        self.stop_token_ids = stop_token_ids

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, {self.num_prompt_tokens} prompt + "
            f"{self.num_output_tokens} output tokens, {self.num_computed_tokens} computed)"
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens known on the host."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known on the host, prompt and output."""
        return len(self.all_token_ids)

    @property
    def num_tokens_with_placeholders(self) -> int:
        """Tokens known on the host or sampled by a step already dispatched."""
        return len(self.all_token_ids) + self.num_output_placeholders

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that must not come before ``min_tokens``; with ``ignore_eos`` the model's, too."""
        return self.sampling_params.all_stop_token_ids | self.eos_token_ids

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached blocks serve: logprobs of the prompt need all of it computed."""
        params = self.sampling_params
        return params.prompt_logprobs is None and not params.skip_reading_prefix_cache

    def append_output_token(self, token_id: int) -> None:
        """Add a sampled token whose value has reached the host."""
        self.all_token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def find_stop(self) -> tuple[FinishReason, int | None] | None:
        """Say whether the newest output token ends the request.

        Returns:
            The reason, and the token id where it is one of the user's stop tokens (None
            for the model's own end tokens and for length); None if the request goes on.
        """
        token_id = self.all_token_ids[-1]
        if token_id in self.stop_token_ids and (
            len(self.output_token_ids) >= self.sampling_params.min_tokens
        ):
            is_eos = token_id in self.eos_token_ids and not self.sampling_params.ignore_eos
            return FinishReason.STOP, None if is_eos else token_id
        if len(self.all_token_ids) >= self.max_num_tokens:
            return FinishReason.LENGTH, None
        return None


def token_id_outside(token_ids: Sequence[int], vocab_size: int) -> int | None:
    """Return a token id that is not in the vocabulary, or None if there is none."""
    if isinstance(token_ids, array) and token_ids:
        packed = np.frombuffer(token_ids, np.int32)  # 60 times as fast as min and max of a list
        low, high = int(packed.min()), int(packed.max())
    else:
        low, high = min(token_ids, default=0), max(token_ids, default=0)
    return next((bad for bad in (low, high) if not 0 <= bad < vocab_size), None)


def _token_array(request_id: str, token_ids: Sequence[int]) -> "array[int]":
    try:
        return array("i", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(
            f"request {request_id!r}: prompt_token_ids must be integers of 32 bits: {error}"
        ) from error
