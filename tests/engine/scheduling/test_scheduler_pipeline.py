"""Requests take turns in groups, so that the stages of a pipeline work at the same time."""

import collections

import pytest

from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from tests.engine.helpers import add, make_request, make_scheduler, schedule, update

NUM_TOKENS = 40


def slots_of(step: SchedulerOutput) -> list[int]:
    return [row.request.slot for row in step.rows]


def test_after_their_prompts_requests_take_turns_in_groups_of_one_size() -> None:
    scheduler = make_scheduler(max_num_seqs=8, num_stages=2, max_in_flight=3)
    add(scheduler, *[make_request(str(i), 3, max_tokens=9) for i in range(8)])
    steps = [schedule(scheduler) for _ in range(3)]
    assert [slots_of(step) for step in steps] == [list(range(8)), [0, 1, 2, 3], [4, 5, 6, 7]]
    for _ in range(6):
        update(scheduler, steps.pop(0))
        steps.append(schedule(scheduler))
    assert slots_of(steps[-2]) == [0, 1, 2, 3]
    assert slots_of(steps[-1]) == [4, 5, 6, 7]


def test_a_request_alone_is_scheduled_without_waiting_for_the_host() -> None:
    scheduler = make_scheduler(num_stages=2, max_in_flight=3)
    add(scheduler, make_request("a", 3))
    steps = [schedule(scheduler) for _ in range(3)]
    assert [step.rows[0].is_token_on_device for step in steps] == [False, True, True]


def test_the_chunks_of_a_prompt_follow_each_other_into_the_pipeline() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, num_stages=3, max_in_flight=4)
    add(scheduler, make_request("a", 12))
    starts = [schedule(scheduler).rows[0].num_computed_tokens for _ in range(3)]
    assert starts == [0, 4, 8]


def pipeline_seconds(num_groups: int, num_stages: int, num_requests: int) -> float:
    """Run to the end and return the time, a stage taking 1 for each row of a step.

    A stage takes one step after the other, each behind the stage before it; a row whose token is
    not known waits for the step that samples it, and the host reads the oldest step when as many
    are in flight as may be.
    """
    max_in_flight = num_stages + 1
    scheduler = make_scheduler(
        num_blocks=1000,
        max_num_seqs=num_requests,
        num_stages=num_groups,
        max_in_flight=max_in_flight,
    )
    add(scheduler, *[make_request(str(i), 1, max_tokens=NUM_TOKENS) for i in range(num_requests)])
    free_at = [0.0] * num_stages
    sampled_at: dict[int, float] = {}
    in_flight: collections.deque[tuple[SchedulerOutput, float]] = collections.deque()
    now = 0.0
    while scheduler.has_unfinished_requests:
        step = scheduler.schedule()
        if step is not None:
            reads = [sampled_at[row.request.slot] for row in step.rows if row.is_token_on_device]
            done = max([now, *reads])
            for stage in range(num_stages):
                done = free_at[stage] = max(done, free_at[stage]) + len(step.rows)
            sampled_at.update(dict.fromkeys(slots_of(step), done))
            in_flight.append((step, done))
        if step is None or len(in_flight) == max_in_flight:
            oldest, done = in_flight.popleft()
            now = max(now, done)
            update(scheduler, oldest)
    return max(free_at)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_the_stages_work_at_the_same_time(num_stages: int) -> None:
    work = NUM_TOKENS * 12  # of each stage
    assert pipeline_seconds(num_stages, num_stages, num_requests=12) < 1.1 * work
    # One batch of all requests goes through the stages one after the other.
    assert pipeline_seconds(1, num_stages, num_requests=12) == num_stages * work


@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_fewer_requests_than_stages_take_what_their_tokens_need(num_requests: int) -> None:
    assert pipeline_seconds(4, 4, num_requests) <= 4 * (NUM_TOKENS + num_requests)
