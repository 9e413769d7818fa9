"""Tests of jaxengine.engine.scheduling.step_budget, alone and in the scheduler."""

import random

import pytest

from jaxengine.engine.scheduling.step_budget import fitted_budget
from tests.engine.helpers import add, make_request, make_scheduler, run_step, scheduled_tokens

SIZES = (16, 32, 64)


@pytest.mark.parametrize(
    ("num_decodes", "num_prefill_tokens", "expected"),
    [
        (0, 17, 16),  # one token more than a size
        (0, 24, 16),
        (0, 25, None),  # three quarters of 32 are 24: fill the rest
        (0, 32, None),  # fits exactly
        (0, 33, 32),
        (0, 48, 32),
        (0, 49, None),
        (0, 16, None),  # no larger than the smallest size
        (0, 5, None),
        (0, 65, None),  # no size holds it: the budget decides
        (8, 12, 16),
        (14, 6, None),  # 2 of 6 tokens would have a place: too few
        (13, 6, 16),
        (17, 0, None),
    ],
)
def test_a_step_that_fills_little_more_than_a_size_is_cut_down_to_it(
    num_decodes: int, num_prefill_tokens: int, expected: int | None
) -> None:
    found = fitted_budget(SIZES, num_decodes=num_decodes, num_prefill_tokens=num_prefill_tokens)
    assert found == expected


def test_without_sizes_nothing_is_cut_down() -> None:
    assert fitted_budget((), num_decodes=1, num_prefill_tokens=100) is None


def test_the_rest_of_a_prompt_comes_in_the_next_step_beside_its_decode_rows() -> None:
    scheduler = make_scheduler(step_sizes=SIZES)
    add(scheduler, make_request("a", 12), make_request("b", 8))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 12, "b": 4}
    assert scheduled_tokens(run_step(scheduler)) == {"a": 1, "b": 4}
    assert scheduled_tokens(run_step(scheduler)) == {"a": 1, "b": 1}


def test_a_chunk_in_flight_counts_as_computed() -> None:
    scheduler = make_scheduler(step_sizes=SIZES, max_in_flight=2)
    add(scheduler, make_request("a", 40))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert scheduled_tokens(first) == {"a": 32}
    assert scheduled_tokens(second) == {"a": 8}


def test_prompts_that_must_not_be_cut_are_not() -> None:
    scheduler = make_scheduler(step_sizes=SIZES, max_model_len=64, enable_chunked_prefill=False)
    add(scheduler, make_request("a", 20))
    assert scheduled_tokens(run_step(scheduler)) == {"a": 20}


def test_a_limit_for_each_prompt_is_reckoned_with() -> None:
    scheduler = make_scheduler(step_sizes=SIZES, long_prefill_token_threshold=10)
    add(scheduler, make_request("a", 30), make_request("b", 9))  # 19 at once, not 39
    assert scheduled_tokens(run_step(scheduler)) == {"a": 10, "b": 6}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_all_of_it_is_computed(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=200, max_num_seqs=8, step_sizes=SIZES, policy=rng.choice(["fcfs", "priority"])
    )
    lengths = {f"r{i}": rng.randint(1, 60) for i in range(30)}
    waiting = list(lengths)
    computed = dict.fromkeys(lengths, 0)
    for _ in range(2000):
        while waiting and rng.random() < 0.3:
            name = waiting.pop()
            add(scheduler, make_request(name, lengths[name], max_tokens=rng.randint(1, 5)))
        if scheduler.has_unfinished_requests:
            for name, count in scheduled_tokens(run_step(scheduler)).items():
                computed[name] += count
        elif not waiting:
            break
    assert not waiting
    assert all(computed[name] >= length for name, length in lengths.items())
