"""Tests of engine.scheduling.scheduler when steps are scheduled before tokens are known."""

import pytest

from jaxengine.engine.scheduling.request import FinishReason, Request, RequestStatus
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from tests.engine.helpers import EOS, add, make_request, make_scheduler, schedule, update


def preempt_in_flight(max_in_flight: int = 2) -> tuple[Scheduler, Request, list[SchedulerOutput]]:
    """A request that was preempted while a step in flight samples a token for it."""
    scheduler = make_scheduler(num_blocks=7, block_size=4, max_in_flight=max_in_flight)
    victim = make_request("b", 6)  # inside a block when "a" needs one
    add(scheduler, make_request("a", 7), victim)
    in_flight = [schedule(scheduler)]
    while True:
        in_flight.append(schedule(scheduler))
        if in_flight[-1].preempted:
            assert in_flight[-1].preempted == [victim]
            assert victim.num_output_placeholders == 1
            return scheduler, victim, in_flight
        update(scheduler, in_flight.pop(0))


def test_the_next_step_computes_a_token_that_is_still_on_the_device() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    a = make_request("a", 3)
    add(scheduler, a)
    assert not schedule(scheduler).rows[0].is_token_on_device
    row = schedule(scheduler).rows[0]
    assert (row.num_computed_tokens, row.num_scheduled_tokens) == (3, 1)
    assert row.is_token_on_device
    assert row.samples_token
    assert (a.num_tokens, a.num_tokens_with_placeholders) == (3, 5)


def test_a_token_that_has_come_back_is_taken_from_the_host() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    a = make_request("a", 3)
    add(scheduler, a)
    update(scheduler, schedule(scheduler), token=5)
    assert not schedule(scheduler).rows[0].is_token_on_device
    assert a.all_token_ids[3] == 5


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_no_more_steps_are_in_flight_than_allowed(max_in_flight: int) -> None:
    scheduler = make_scheduler(max_in_flight=max_in_flight)
    add(scheduler, make_request("a"))
    steps = [schedule(scheduler) for _ in range(max_in_flight)]
    assert scheduler.schedule() is None
    assert scheduler.num_in_flight == max_in_flight
    update(scheduler, steps[0])
    assert scheduler.schedule() is not None


def test_a_request_whose_last_token_is_in_flight_is_not_scheduled() -> None:
    scheduler = make_scheduler(max_in_flight=3)
    a = make_request("a", 3, max_tokens=2)
    add(scheduler, a)
    steps = [schedule(scheduler), schedule(scheduler)]
    assert scheduler.schedule() is None
    assert scheduler.has_unfinished_requests
    update(scheduler, steps[0])
    assert scheduler.schedule() is None
    (output,) = update(scheduler, steps[1])
    assert output.finish_reason is FinishReason.LENGTH
    assert a.output_token_ids == [7, 7]


def test_the_token_behind_a_stop_token_is_dropped() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    a = make_request("a")
    add(scheduler, a)
    first, second = schedule(scheduler), schedule(scheduler)
    (output,) = update(scheduler, first, token=EOS)
    assert output.finish_reason is FinishReason.STOP
    assert update(scheduler, second, token=8) == []
    assert a.output_token_ids == [EOS]
    assert scheduler.stats().num_held_blocks == 0


def test_tokens_of_an_aborted_request_are_dropped() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    a = make_request("a")
    add(scheduler, a)
    steps = [schedule(scheduler), schedule(scheduler)]
    scheduler.abort("a")
    assert [update(scheduler, step) for step in steps] == [[], []]
    assert a.output_token_ids == []


def test_a_late_token_does_not_reach_the_new_owner_of_the_slot() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_in_flight=2)
    a, b = make_request("a"), make_request("b")
    add(scheduler, a, b)
    late = schedule(scheduler)
    scheduler.abort("a")
    step = schedule(scheduler)
    assert (step.rows[0].request, b.slot) == (b, 0)
    assert update(scheduler, late, token=5) == []
    update(scheduler, step, token=6)
    assert b.output_token_ids == [6]


def test_a_reused_id_does_not_receive_the_tokens_of_its_predecessor() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    add(scheduler, make_request("a"))
    late = schedule(scheduler)
    scheduler.abort("a")
    again = make_request("a")
    add(scheduler, again)
    assert update(scheduler, late) == []
    assert again.output_token_ids == []


def test_a_token_in_flight_survives_the_preemption_of_its_request() -> None:
    scheduler, victim, in_flight = preempt_in_flight()
    num_tokens = victim.num_output_tokens
    outputs = update(scheduler, in_flight[0], token=5)
    assert [output.request_id for output in outputs] == ["a", "b"]
    assert victim.output_token_ids[num_tokens:] == [5]
    assert victim.num_output_placeholders == 0


def test_a_preempted_request_waits_for_its_tokens_in_flight() -> None:
    scheduler, victim, in_flight = preempt_in_flight(max_in_flight=3)
    scheduler.abort("a")
    assert scheduler.schedule() is None
    while victim.num_output_placeholders:
        update(scheduler, in_flight.pop(0))
    assert schedule(scheduler).admitted == [victim]


def test_a_preempted_request_can_end_with_a_token_in_flight() -> None:
    scheduler, victim, in_flight = preempt_in_flight()
    assert update(scheduler, in_flight[0], token=EOS)[1].finish_reason is FinishReason.STOP
    assert victim.status is RequestStatus.FINISHED
    assert scheduler.num_waiting == 0


def test_a_preempted_and_aborted_request_drops_its_token_in_flight() -> None:
    scheduler, victim, in_flight = preempt_in_flight()
    tokens = list(victim.output_token_ids)
    assert scheduler.abort("b") is victim
    outputs = update(scheduler, in_flight[0])
    assert [output.request_id for output in outputs] == ["a"]
    assert victim.output_token_ids == tokens


def test_steps_must_come_back_in_order() -> None:
    scheduler = make_scheduler(max_in_flight=2)
    add(scheduler, make_request("a"))
    schedule(scheduler)
    second = schedule(scheduler)
    with pytest.raises(AssertionError, match="steps come back in order"):
        scheduler.update_from_output(second, [7])
