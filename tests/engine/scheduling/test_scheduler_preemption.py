"""Tests of jaxengine.engine.scheduling.scheduler when blocks run out."""

import pytest

from jaxengine.engine.scheduling.request import FinishReason, Request, RequestStatus
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from tests.engine.helpers import add, make_request, make_scheduler, run_step, scheduled_tokens


def names(requests: list[Request]) -> str:
    return "".join(request.request_id for request in requests)


def run_until_preempted(scheduler: Scheduler) -> SchedulerOutput:
    """The first step that takes blocks from somebody."""
    while not (step := run_step(scheduler)).preempted:
        pass
    return step


def test_the_last_admitted_request_gives_its_blocks_to_the_first() -> None:
    # 5 blocks of 4: "a" and "b" take 2 each, and both need a third at their ninth token.
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    a, b = make_request("a", 8), make_request("b", 7)
    add(scheduler, a, b)
    run_step(scheduler)
    run_step(scheduler)  # "a" takes the fifth block
    step = run_step(scheduler)
    assert step.preempted == []
    assert scheduled_tokens(step) == {"a": 1}  # "b" waits for a block, keeping its own
    for _ in range(2):
        run_step(scheduler)
    step = run_step(scheduler)
    assert names(step.preempted) == "b"
    assert b.status is RequestStatus.PREEMPTED
    assert (b.slot, b.block_ids, b.num_computed_tokens) == (-1, [], 0)
    assert scheduler.stats().num_preemptions == b.num_preemptions == 1


def test_a_preempted_request_is_computed_again_with_its_output() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, enable_prefix_caching=False)
    a, b = make_request("a", 8), make_request("b", 7)
    add(scheduler, a, b)
    for _ in range(6):
        run_step(scheduler)
    assert b.status is RequestStatus.PREEMPTED
    scheduler.abort("a")
    row = run_step(scheduler).rows[0]
    assert (row.request, row.num_computed_tokens, row.num_scheduled_tokens) == (b, 0, 9)
    assert row.samples_token
    assert b.output_token_ids == [7, 7, 7]


def test_a_preempted_request_finds_its_own_blocks_in_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=9, block_size=4)
    b = make_request("b", 10)
    add(scheduler, make_request("a", 11), b)
    run_until_preempted(scheduler)
    scheduler.abort("a")
    row = run_step(scheduler).rows[0]
    # Its last block was not full, and is what "a" has taken.
    assert (row.request, row.num_computed_tokens, row.num_scheduled_tokens) == (b, 12, 4)
    assert scheduler.stats().prefix_cache_hits == 0  # its own work is no hit


def test_preempted_requests_come_back_before_new_ones() -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4)
    add(scheduler, make_request("a", 7), make_request("b", 8), make_request("c", 8))
    assert names(run_until_preempted(scheduler).preempted) == "b"
    scheduler.abort("a")
    assert names(run_step(scheduler).admitted)[0] == "b"


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "b"), ("priority", "a")])
def test_the_victim_is_the_last_in_the_order_of_the_policy(policy: str, victim: str) -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4, policy=policy)
    add(scheduler, make_request("a", 7, priority=5))
    run_step(scheduler)
    add(scheduler, make_request("b", 8, priority=1))
    assert names(run_until_preempted(scheduler).preempted) == victim


def test_no_request_is_admitted_in_a_step_that_is_short_of_blocks() -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4, policy="priority")
    add(scheduler, make_request("a", 7, priority=0), make_request("b", 8, priority=2))
    run_step(scheduler)
    add(scheduler, make_request("c", 1, priority=1))  # fits as soon as "b" is gone
    step = run_until_preempted(scheduler)
    assert scheduled_tokens(step) == {"a": 1}
    assert names(run_step(scheduler).admitted) == "c"


def test_admission_leaves_a_block_for_every_running_request() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    add(scheduler, make_request("a", 8), make_request("b", 4), make_request("c", 4))
    # After "a" and "b" two blocks are left: one each to grow into.
    assert scheduled_tokens(run_step(scheduler)) == {"a": 8, "b": 4}
    assert run_step(scheduler).preempted == []


def test_the_watermark_keeps_a_fraction_of_the_pool_free() -> None:
    scheduler = make_scheduler(num_blocks=11, block_size=4, watermark=0.5)
    add(scheduler, make_request("a", 16), make_request("b", 5))  # 4 and 2 of 10 blocks
    assert scheduled_tokens(run_step(scheduler)) == {"a": 16}


def test_the_watermark_does_not_hold_for_a_request_that_runs_alone() -> None:
    scheduler = make_scheduler(num_blocks=11, block_size=4, watermark=0.5)
    add(scheduler, make_request("a", 40))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 40}


def test_blocks_promised_to_a_half_computed_prompt_are_not_promised_again() -> None:
    scheduler = make_scheduler(
        num_blocks=12, block_size=4, max_num_batched_tokens=16, long_prefill_token_threshold=8
    )
    add(scheduler, make_request("a", 32), make_request("b", 12))  # 8 and 3 of 11 blocks
    assert scheduled_tokens(run_step(scheduler)) == {"a": 8}
    assert scheduler.num_waiting == 1


def test_a_request_that_outgrows_the_pool_alone_ends_by_length() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    a = make_request("a", 8, max_tokens=None)
    add(scheduler, a)
    while scheduler.has_unfinished_requests:
        run_step(scheduler)
    assert a.finish_reason is FinishReason.LENGTH
    assert a.num_tokens == 13  # 12 fit, and the last one sampled needs no K/V
    assert a.num_preemptions == 0
