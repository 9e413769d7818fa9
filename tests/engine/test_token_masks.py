"""Masks follow the tokens: known ones, those in flight, and each of them once."""

from collections import deque
from typing import Any

import numpy as np
import pytest

from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from jaxengine.engine.token_masks import TokenMasks
from jaxengine.structured.constraint import allow_only
from tests.engine.helpers import add, make_request, make_scheduler, schedule

V = 200


class Follows:
    """Allows the token behind the newest one; notes what it was given."""

    def __init__(self, error_at: int | None = None) -> None:
        self.tokens: list[int] = []
        self.error_at = error_at
        self.is_terminated = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def error(self) -> str | None:
        return "lost" if len(self.tokens) == self.error_at else None

    def accept(self, token_id: int) -> None:
        self.tokens.append(token_id)

    def fill(self, row: np.ndarray) -> None:
        allow_only(row, (self.tokens or [99])[-1] + 1)

    def rollback(self, num_tokens: int) -> None:
        del self.tokens[len(self.tokens) - num_tokens :]


class InFlight:
    """A dispatched step, whose tokens nobody but the masks has read."""

    def __init__(self, step: SchedulerOutput, tokens: list[int]) -> None:
        self.scheduler_output = step
        self.tokens = tokens
        self.num_reads = 0

    def token_ids(self) -> np.ndarray:
        self.num_reads += 1
        return np.array(self.tokens)


def constrained(name: str, prompt: int = 3, **more: Any) -> Any:
    request = make_request(name, prompt, **more)
    request.constraint = Follows()
    return request


def allowed(masks: np.ndarray) -> list[list[int]]:
    return [
        np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
        for row in masks
    ]


@pytest.mark.parametrize("max_in_flight", [1, 2, 4])
def test_each_mask_follows_all_tokens_before_it_and_reads_only_steps_of_its_requests(
    max_in_flight: int,
) -> None:
    scheduler = make_scheduler(max_in_flight=max_in_flight, num_stages=max(1, max_in_flight - 1))
    first, second, free = constrained("a"), constrained("b"), make_request("c")
    add(scheduler, first, free, second)
    masks, in_flight, expected = TokenMasks(V), deque[InFlight](), {first: [], second: []}
    for number in range(30):
        while (step := scheduler.schedule()) is not None:
            rows = [row for row in step.rows if row.request is not free]
            filled = masks.fill(step, len(rows) + 1, in_flight)
            wanted = [[(expected[row.request] or [99])[-1] + 1] for row in rows]
            assert allowed(filled)[:-1] == wanted
            assert (filled[-1] == -1).all()
            tokens = [(number * 7 + i) % 90 for i in range(len(step.rows))]
            for row, token in zip(step.rows, tokens, strict=True):
                if row.request is not free:
                    expected[row.request].append(token)
            in_flight.append(InFlight(step, tokens))
        oldest = in_flight.popleft()
        scheduler.update_from_output(oldest.scheduler_output, oldest.tokens)
    num_known = first.num_output_tokens
    assert num_known >= 10
    assert first.output_token_ids == expected[first][:num_known]
    given = first.constraint.tokens
    assert given == expected[first][: len(given)]
    assert len(given) >= num_known - 1  # the newest one is given with the next mask


def test_steps_without_the_request_are_not_waited_for() -> None:
    scheduler = make_scheduler(max_in_flight=3)
    add(scheduler, make_request("free"))
    other = InFlight(schedule(scheduler), [5])
    add(scheduler, constrained("bound"))
    step = schedule(scheduler)
    TokenMasks(V).fill(step, 1, [other])
    assert other.num_reads == 0
    mine = InFlight(step, [6, 7])
    TokenMasks(V).fill(schedule(scheduler), 1, [other, mine])
    assert (other.num_reads, mine.num_reads) == (0, 1)


def test_a_chunk_inside_a_prompt_needs_no_mask() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, max_model_len=64)
    request = constrained("a", 20)
    add(scheduler, request)
    masks = TokenMasks(V)
    for is_last in (False, False, True):
        step = schedule(scheduler)
        filled = masks.fill(step, 1, [])
        assert (allowed(filled) == [[100]]) == is_last
        scheduler.update_from_output(step, [5])


def test_a_constraint_that_fails_is_noted_by_its_request() -> None:
    scheduler = make_scheduler()
    request = constrained("a")
    request.constraint.error_at = 1
    add(scheduler, request)
    masks = TokenMasks(V)
    for broken in ({}, {"a": "lost"}):
        step = schedule(scheduler)
        masks.fill(step, 1, [])
        assert masks.broken == broken
        scheduler.update_from_output(step, [5])


def test_every_fill_is_a_new_array() -> None:
    """The device may read the one of the step before while the next is filled."""
    scheduler = make_scheduler()
    add(scheduler, constrained("a"))
    step = schedule(scheduler)
    masks = TokenMasks(V)
    assert masks.fill(step, 1, []) is not masks.fill(step, 1, [])
