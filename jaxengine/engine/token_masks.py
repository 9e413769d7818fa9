"""Masks of a step: which tokens its rows may sample, for requests that have a constraint.

A row's mask follows from all tokens before it, the newest of which may be in flight. So masks are
filled between a step's forward programs and its sampler: while the devices compute the forward,
the host reads the tokens of the step before and moves the constraints on.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from jaxengine.engine.scheduling.request import Request
from jaxengine.engine.scheduling.scheduler_output import ScheduledRow, SchedulerOutput
from jaxengine.structured.constraint import num_mask_words
from jaxengine.structured.masks import fill_masks


class StepInFlight(Protocol):
    """What is read of a ``PendingStep``."""

    @property
    def scheduler_output(self) -> SchedulerOutput:
        """What was scheduled."""

    def token_ids(self) -> np.ndarray:
        """Wait for the step and return the token ids of its rows."""


class TokenMasks:
    """Keeps constraints in step with their requests' tokens.

    Args:
        vocab_size: V.

    Attributes:
        broken: Request id -> why its constraint cannot go on. Such a request samples end tokens
            until it is taken out.
    """

    def __init__(self, vocab_size: int) -> None:
        self._num_words = num_mask_words(vocab_size)
        self.broken: dict[str, str] = {}

    def fill(
        self, step: SchedulerOutput, num_masks: int, in_flight: Iterable[StepInFlight]
    ) -> np.ndarray:
        """Return the masks of a step's constrained rows, in the order of the rows.

        Waits for those steps in flight that sample for the same requests.

        Args:
            step: About to be sampled.
            num_masks: At least as many as there are such rows.
            in_flight: The steps before it whose tokens the scheduler does not know, oldest first.

        Returns:
            [num_masks, ceil(V/32)] int32, a new array.
        """
        rows = constrained_rows(step)
        newest = _tokens_in_flight([row.request for _, row in rows], in_flight)
        for _, row in rows:
            _catch_up(row, newest[row.request])
        masks = np.full((num_masks, self._num_words), -1, np.int32)
        fill_masks([row.request.constraint for _, row in rows], masks)
        for _, row in rows:
            if (error := row.request.constraint.error) is not None:
                self.broken[row.request.request_id] = error
        return masks


def _catch_up(row: ScheduledRow, in_flight: Sequence[int]) -> None:
    """Give a row's constraint the tokens that it has not seen."""
    request, constraint = row.request, row.request.constraint
    num_known, num_read = len(request.output_token_ids), constraint.num_tokens
    unread = request.output_token_ids[num_read:]
    for token_id in (*unread, *in_flight[max(0, num_read - num_known) :]):
        constraint.accept(token_id)
    position = row.num_computed_tokens + row.num_scheduled_tokens
    assert constraint.num_tokens == position - request.num_prompt_tokens, "a token is missing"


def constrained_rows(step: SchedulerOutput) -> list[tuple[int, ScheduledRow]]:
    """The rows that sample a token under a constraint, with their places."""
    return [
        (index, row)
        for index, row in enumerate(step.rows)
        if row.request.constraint is not None and row.samples_token
    ]


def _tokens_in_flight(
    requests: Sequence[Request], steps: Iterable[StepInFlight]
) -> dict[Request, list[int]]:
    """The tokens of these requests that steps in flight sample, oldest first."""
    tokens: dict[Request, list[int]] = {request: [] for request in requests}
    for step in steps:
        found = [(i, r) for i, r in constrained_rows(step.scheduler_output) if r.request in tokens]
        if found:
            token_ids = step.token_ids()
            for index, row in found:
                tokens[row.request].append(int(token_ids[index]))
    return tokens
