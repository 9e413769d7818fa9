"""Tests of engine.scheduling.scheduler and block_allocator: prefix cache and sliding window."""

import pytest

from jaxengine.engine.scheduling.block_pool import NULL_BLOCK_ID
from tests.engine.helpers import (
    add,
    make_request,
    make_scheduler,
    run_step,
    schedule,
    scheduled_tokens,
    update,
)

PROMPT = [10, 11, 12, 13, 14, 15, 16, 17, 18]  # two full blocks of 4, and one token


def test_a_prompt_seen_before_is_computed_from_where_it_differs() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", PROMPT))
    run_step(scheduler)
    scheduler.abort("a")
    add(scheduler, make_request("b", [*PROMPT[:8], 50, 51]))
    step = schedule(scheduler)
    assert scheduled_tokens(step) == {"b": 2}
    assert update(scheduler, step)[0].num_cached_tokens == 8
    stats = scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (19, 8)


def test_one_different_token_hides_everything_behind_it() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", PROMPT))
    run_step(scheduler)
    add(scheduler, make_request("b", [99, *PROMPT[1:]]))
    assert scheduled_tokens(run_step(scheduler))["b"] == 9


def test_requests_of_one_step_share_their_prompt() -> None:
    scheduler = make_scheduler(block_size=4)
    requests = [make_request(name, PROMPT) for name in "abc"]
    add(scheduler, *requests)
    assert scheduled_tokens(run_step(scheduler)) == {"a": 9, "b": 1, "c": 1}
    assert {tuple(request.block_ids[:2]) for request in requests} == {(1, 2)}
    assert len({request.block_ids[2] for request in requests}) == 3


def test_only_the_chunk_that_has_been_scheduled_is_shared() -> None:
    scheduler = make_scheduler(
        block_size=4, max_num_batched_tokens=16, long_prefill_token_threshold=6
    )
    add(scheduler, make_request("a", PROMPT), make_request("b", PROMPT))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 6, "b": 5}


def test_the_last_token_is_computed_even_if_all_blocks_are_cached() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", PROMPT[:8]))
    run_step(scheduler)
    add(scheduler, make_request("b", PROMPT[:8]))
    assert scheduled_tokens(run_step(scheduler))["b"] == 4


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", PROMPT))
    run_step(scheduler)
    add(scheduler, make_request("b", PROMPT, prompt_logprobs=0))
    assert scheduled_tokens(run_step(scheduler))["b"] == 9
    assert scheduler.stats().prefix_cache_queries == 9  # those of "a"


def test_blocks_are_shared_only_with_the_same_salt() -> None:
    scheduler = make_scheduler(block_size=4)
    add(scheduler, make_request("a", PROMPT, cache_salt="x"))
    run_step(scheduler)
    add(scheduler, make_request("b", PROMPT), make_request("c", PROMPT, cache_salt="x"))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 1, "b": 9, "c": 1}


def test_nothing_is_shared_with_prefix_caching_off() -> None:
    scheduler = make_scheduler(block_size=4, enable_prefix_caching=False)
    add(scheduler, make_request("a", PROMPT), make_request("b", PROMPT))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 9, "b": 9}
    assert scheduler.stats().prefix_cache_queries == 0


def test_generated_tokens_serve_the_next_turn_of_a_conversation() -> None:
    scheduler = make_scheduler(block_size=4)
    a = make_request("a", PROMPT, max_tokens=4)
    add(scheduler, a)
    for _ in range(4):
        run_step(scheduler)
    assert a.is_finished
    add(scheduler, make_request("b", [*PROMPT, 7, 7, 7, 7, 50]))
    assert scheduled_tokens(run_step(scheduler)) == {"b": 2}  # 12 of 14 are cached


def test_a_block_is_not_named_before_its_tokens_are_known() -> None:
    scheduler = make_scheduler(block_size=4, max_in_flight=3)
    a = make_request("a", [10, 11, 12])
    add(scheduler, a)
    first = schedule(scheduler)
    schedule(scheduler)  # computes token 3, the last of the block, whose value is unknown
    assert a.num_computed_tokens == 4
    assert a.block_hashes == []
    update(scheduler, first, token=5)
    schedule(scheduler)
    assert len(a.block_hashes) == 1


def test_a_block_that_became_known_in_flight_is_cached_when_the_request_ends() -> None:
    scheduler = make_scheduler(block_size=4, max_in_flight=2)
    add(scheduler, make_request("a", [10, 11, 12]))
    first = schedule(scheduler)
    late = schedule(scheduler)
    update(scheduler, first, token=5)
    scheduler.abort("a")
    update(scheduler, late)
    add(scheduler, make_request("b", [10, 11, 12, 5, 6]))
    assert scheduled_tokens(run_step(scheduler)) == {"b": 1}


def test_an_evicted_prefix_is_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    add(scheduler, make_request("a", PROMPT))
    run_step(scheduler)
    scheduler.abort("a")
    add(scheduler, make_request("b", 16))  # takes all four blocks
    run_step(scheduler)
    scheduler.abort("b")
    add(scheduler, make_request("c", PROMPT))
    assert scheduled_tokens(run_step(scheduler)) == {"c": 9}


def test_cached_blocks_that_are_free_count_against_admission() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    add(scheduler, make_request("a", PROMPT))
    run_step(scheduler)
    scheduler.abort("a")
    # "b" takes the three empty blocks; "c" needs the two cached ones and a third.
    add(scheduler, make_request("b", 11), make_request("c", PROMPT))
    assert scheduled_tokens(run_step(scheduler)) == {"b": 11}


def test_blocks_behind_the_sliding_window_are_given_back() -> None:
    scheduler = make_scheduler(block_size=4, sliding_window=4)
    a = make_request("a", 12)
    add(scheduler, a)
    run_step(scheduler)
    assert a.block_ids == [1, 2, 3]
    run_step(scheduler)  # token 12 sees 9 to 12: blocks 2 and 3 by index
    assert a.block_ids[:2] == [NULL_BLOCK_ID, NULL_BLOCK_ID]
    assert scheduler.stats().num_held_blocks == 2


def test_with_a_sliding_window_a_request_may_be_longer_than_the_pool() -> None:
    scheduler = make_scheduler(
        num_blocks=5, block_size=4, sliding_window=4, max_num_batched_tokens=8
    )
    a = make_request("a", 40, max_tokens=10)
    add(scheduler, a)
    while scheduler.has_unfinished_requests:
        run_step(scheduler)
    assert a.num_output_tokens == 10
    assert a.num_preemptions == 0


def test_with_a_sliding_window_a_prefix_counts_if_its_last_window_is_cached() -> None:
    scheduler = make_scheduler(num_blocks=9, block_size=4, sliding_window=4)
    add(scheduler, make_request("a", [*PROMPT, 19, 20, 21, 22]))  # blocks 1 to 4
    run_step(scheduler)
    scheduler.abort("a")
    add(scheduler, make_request("b", 20))  # four empty blocks, and evicts index 2 of "a"
    run_step(scheduler)
    scheduler.abort("b")
    c = make_request("c", PROMPT)
    add(scheduler, c)
    assert scheduled_tokens(run_step(scheduler)) == {"c": 1}
    assert c.block_ids[0] == NULL_BLOCK_ID


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_the_prefix_cache_can_be_forgotten(sliding_window: int | None) -> None:
    scheduler = make_scheduler(block_size=4, sliding_window=sliding_window)
    add(scheduler, make_request("a", PROMPT))
    run_step(scheduler)
    scheduler.abort("a")
    assert scheduler.block_pool.reset_prefix_cache()
    add(scheduler, make_request("b", PROMPT))
    assert scheduled_tokens(run_step(scheduler)) == {"b": 9}
