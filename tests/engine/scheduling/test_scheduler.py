"""Tests of jaxengine.engine.scheduling.scheduler: limits, batching, policies, ends, errors."""

import numpy as np
import pytest

from jaxengine.engine.scheduling.request import FinishReason, RequestStatus
from tests.engine.helpers import (
    add,
    make_request,
    make_scheduler,
    run_step,
    schedule,
    scheduled_tokens,
    update,
)


def test_a_prompt_is_computed_and_then_one_token_a_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 5))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 5}
    assert scheduled_tokens(run_step(scheduler)) == {"a": 1}


def test_nothing_to_do_gives_no_step() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished_requests


def test_new_prompts_join_running_requests_in_one_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 5))
    run_step(scheduler)
    add(scheduler, make_request("b", 6))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 1, "b": 6}


def test_rows_of_one_token_come_first_even_from_a_prompt() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 5), make_request("b", 1), make_request("c", 2))
    step = run_step(scheduler)
    assert [row.request.request_id for row in step.rows] == ["b", "a", "c"]
    assert step.num_decode_rows == 1
    assert step.num_scheduled_tokens == 8


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", 18))
    steps = [run_step(scheduler) for _ in range(4)]
    rows = [step.rows[0] for step in steps]
    assert [row.num_scheduled_tokens for row in rows] == [8, 8, 2, 1]
    assert [row.num_computed_tokens for row in rows] == [0, 8, 16, 18]
    assert [row.samples_token for row in rows] == [False, False, True, True]


def test_a_chunk_inside_a_prompt_brings_no_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", 10))
    assert update(scheduler, schedule(scheduler)) == []
    assert [output.new_token_ids for output in update(scheduler, schedule(scheduler))] == [[7]]


def test_the_long_prefill_threshold_leaves_budget_for_others() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, long_prefill_token_threshold=4)
    add(scheduler, make_request("a", 10), make_request("b", 3))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 4, "b": 3}
    assert scheduled_tokens(run_step(scheduler)) == {"a": 4, "b": 1}


def test_without_chunked_prefill_a_prompt_waits_for_a_step_it_fits_into() -> None:
    scheduler = make_scheduler(
        max_num_batched_tokens=16, max_model_len=16, enable_chunked_prefill=False
    )
    add(scheduler, make_request("a", 10), make_request("b", 10))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 10}
    assert scheduled_tokens(run_step(scheduler)) == {"a": 1, "b": 10}


def test_no_more_requests_run_than_there_are_slots() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, *map(make_request, "abc"))
    assert scheduled_tokens(run_step(scheduler)).keys() == {"a", "b"}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.abort("a")
    assert scheduled_tokens(run_step(scheduler)).keys() == {"b", "c"}


def test_a_slot_is_kept_while_running_and_given_on_afterwards() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    a, b, c = (make_request(name) for name in "abc")
    add(scheduler, a, b, c)
    step = run_step(scheduler)
    assert (a.slot, b.slot, c.slot) == (0, 1, -1)
    assert step.admitted == [a, b]
    scheduler.abort("a")
    assert run_step(scheduler).admitted == [c]
    assert (a.slot, b.slot, c.slot) == (-1, 1, 0)


def test_the_device_is_told_of_new_blocks_only() -> None:
    scheduler = make_scheduler(block_size=4)
    a = make_request("a", 7)
    add(scheduler, a)
    assert run_step(scheduler).new_block_entries == [(0, 0, [1, 2])]
    assert run_step(scheduler).new_block_entries == []  # the eighth token fits
    assert run_step(scheduler).new_block_entries == [(0, 2, [3])]
    assert a.block_ids == [1, 2, 3]


def test_max_tokens_ends_a_request_and_frees_everything() -> None:
    scheduler = make_scheduler()
    a = make_request("a", 3, max_tokens=2)
    add(scheduler, a)
    run_step(scheduler)
    (output,) = update(scheduler, schedule(scheduler))
    assert output.finish_reason is a.finish_reason is FinishReason.LENGTH
    assert a.output_token_ids == [7, 7]
    assert a.status is RequestStatus.FINISHED
    assert scheduler.num_running == scheduler.stats().num_held_blocks == 0
    assert not scheduler.has_unfinished_requests


def test_the_models_limit_ends_a_request_without_max_tokens() -> None:
    scheduler = make_scheduler(max_model_len=6)
    a = make_request("a", 4, max_tokens=None)
    add(scheduler, a)
    run_step(scheduler)
    run_step(scheduler)
    assert a.finish_reason is FinishReason.LENGTH
    assert a.num_tokens == 6


def test_a_stop_token_ends_a_request_and_is_kept() -> None:
    scheduler = make_scheduler()
    a = make_request("a", stop_token_ids=[8])
    add(scheduler, a)
    (output,) = update(scheduler, schedule(scheduler), token=8)
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, 8)
    assert a.output_token_ids == [8]


def test_tokens_may_come_as_a_numpy_array_and_leave_as_ints() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    (output,) = scheduler.update_from_output(schedule(scheduler), np.array([7], np.int32))
    assert type(output.new_token_ids[0]) is int


def test_outputs_point_at_their_rows() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", 2), make_request("b", 1), make_request("c", 9))
    outputs = scheduler.update_from_output(schedule(scheduler), [11, 12, 13])
    assert [(o.request_id, o.row_index, o.new_token_ids) for o in outputs] == [
        ("b", 0, [11]),
        ("a", 1, [12]),
    ]


def test_abort_ends_a_waiting_request() -> None:
    scheduler = make_scheduler()
    a = make_request("a")
    add(scheduler, a)
    assert scheduler.abort("a") is a
    assert a.finish_reason is FinishReason.ABORT
    assert scheduler.schedule() is None


def test_abort_of_an_unknown_or_ended_request_is_harmless() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    scheduler.abort("a")
    assert scheduler.abort("a") is None
    assert scheduler.abort("b") is None


def test_a_stop_string_found_by_the_text_side_ends_a_request() -> None:
    scheduler = make_scheduler()
    a = make_request("a")
    add(scheduler, a)
    run_step(scheduler)
    assert scheduler.finish("a", FinishReason.STOP, "\n\n") is a
    assert (a.finish_reason, a.stop_reason) == (FinishReason.STOP, "\n\n")
    assert scheduler.stats().num_held_blocks == 0


def test_an_id_can_be_used_again_when_its_request_has_ended() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    scheduler.abort("a")
    add(scheduler, make_request("a"))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 3}


def test_priority_admits_the_smallest_first() -> None:
    scheduler = make_scheduler(policy="priority", max_num_seqs=1)
    add(scheduler, make_request("a", priority=2), make_request("b", priority=1))
    assert scheduled_tokens(run_step(scheduler)) == {"b": 3}


@pytest.mark.parametrize(
    ("request_args", "message"),
    [
        ({"prompt": []}, "request 'x': the prompt is empty"),
        ({"prompt": 64}, r"64 tokens, .* max_model_len \(64\); .* raise --max-model-len"),
        ({"prompt": 49}, "49 tokens and needs 13 KV blocks of 4 tokens, but there are only 12; "),
        ({"prompt": 49}, "raise .*--num-gpu-blocks-override to 14 at least"),
    ],
)
def test_a_request_that_can_never_run_is_refused(request_args: dict, message: str) -> None:
    scheduler = make_scheduler(num_blocks=13, block_size=4, max_model_len=64)
    with pytest.raises(ValueError, match=message):
        scheduler.add_request(make_request("x", **request_args))
    assert not scheduler.has_unfinished_requests
    assert scheduler.schedule() is None


def test_a_duplicate_id_is_refused_and_the_first_request_goes_on() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 3))
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        scheduler.add_request(make_request("a", 5))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 3}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_in_flight": 0}, "max_in_flight is 0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"policy": "lifo"}, "policy is 'lifo'"),
        ({"watermark": 1.0}, "watermark is 1.0"),
        ({"long_prefill_token_threshold": -1}, "threshold is -1"),
        ({"enable_chunked_prefill": False}, r"less than max_model_len \(256\)"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheduler(**limits)


def test_kv_waste_is_the_unused_part_of_held_blocks() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", 5))
    run_step(scheduler)
    assert scheduler.stats().kv_waste == 3 / 8
    run_step(scheduler)
    assert scheduler.stats().kv_waste == 2 / 8
    assert scheduler.stats().kv_waste_average == 5 / 16
    assert scheduler.stats().kv_cache_usage == 2 / 100


def test_shared_blocks_are_counted_once_in_kv_waste() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", [1] * 9), make_request("b", [1] * 9))
    run_step(scheduler)
    stats = scheduler.stats()
    assert stats.num_held_blocks == 4  # two shared, and a last one each
    assert stats.kv_waste == 6 / 16
