"""The whole engine on a tiny model: whatever happens around a request, its tokens stay the same."""

import random
from collections import defaultdict
from typing import Any

import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.engine.engine import Engine, derive_seed
from jaxengine.engine.scheduling.request import FinishReason, Request
from tests.helpers import assert_idle, greedy, random_prompts, with_scheduler

NUM_REQUESTS = 80


def make_requests(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of which many share a beginning, some greedy and some seeded."""
    prefixes = random_prompts(16, 24, 33, seed=rng.randrange(1000))
    requests = []
    for number in range(NUM_REQUESTS):
        (own,) = random_prompts(rng.randint(1, 14), seed=1000 + number)
        shared = rng.choice([[], *prefixes])
        temperature = rng.choice([0.0, 0.0, 1.0])
        params = SamplingParams(
            temperature=temperature,
            seed=number,
            max_tokens=rng.randint(1, 48),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice([None, [7, 8, 9]]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        )
        requests.append((shared + own, params))
    return requests


def run(engine: Engine, *, rng: random.Random | None, requests: list) -> tuple[list, dict]:
    """Run all requests; with a random generator they come bit by bit, and some are aborted."""
    received: dict[str, list[int]] = defaultdict(list)
    submitted: list[Request] = []
    waiting = list(enumerate(requests))
    while waiting or engine.has_unfinished_requests:
        while waiting and (rng is None or rng.random() < 0.4):
            number, (prompt, params) = waiting.pop(0)
            submitted.append(engine.add_request(str(number), prompt, params))
        if rng is not None and rng.random() < 0.02 and submitted:
            engine.abort(rng.choice(submitted).request_id)
        for output in engine.step().outputs:
            received[output.request_id] += output.new_token_ids
        engine.scheduler.check_integrity()
    return submitted, received


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_under_stress_every_request_gets_the_tokens_it_gets_alone(
    llm: LLM, seed: int, max_in_flight: int
) -> None:
    rng = random.Random(seed)
    requests = make_requests(rng)
    alone = with_scheduler(llm, max_num_seqs=1, max_in_flight=1)
    expected, _ = run(alone.engine, rng=None, requests=requests)

    # Requests of up to 95 tokens (6 blocks), four at a time, in 7 blocks.
    small = with_scheduler(llm, num_blocks=8, max_in_flight=max_in_flight)
    submitted, received = run(small.engine, rng=rng, requests=requests)
    for request, reference in zip(submitted, expected, strict=True):
        tokens = received[request.request_id]
        assert tokens == request.output_token_ids
        if request.finish_reason is FinishReason.ABORT:
            assert tokens == reference.output_token_ids[: len(tokens)]
        else:
            assert tokens == reference.output_token_ids
            assert request.finish_reason is reference.finish_reason
            assert request.stop_reason == reference.stop_reason
    stats = small.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert {request.finish_reason for request in submitted} == set(FinishReason)
    assert_idle(small)


def test_a_step_is_dispatched_before_the_tokens_of_the_last_are_read(llm: LLM) -> None:
    engine = with_scheduler(llm, max_in_flight=2).engine
    engine.add_request("0", [10, 11, 12], greedy(3))
    engine.dispatch()
    assert engine.scheduler.num_in_flight == 2  # the prompt's step and the next, none read
    results = [engine.step() for _ in range(3)]
    found = [[output.new_token_ids for output in result.outputs] for result in results]
    assert [len(tokens) for tokens in found] == [1, 1, 1]
    assert results[-1].outputs[0].finish_reason is FinishReason.LENGTH
    assert not engine.has_unfinished_requests


def test_without_async_scheduling_every_step_is_read_at_once(llm: LLM) -> None:
    engine = with_scheduler(llm, max_in_flight=1).engine
    engine.add_request("0", [10, 11, 12], greedy(2))
    assert [len(engine.step().outputs) for _ in range(2)] == [1, 1]
    assert not engine.has_unfinished_requests


def test_an_idle_engine_steps_without_effect(llm: LLM) -> None:
    assert llm.engine.step().outputs == []
    assert not llm.engine.has_unfinished_requests


def test_an_aborted_request_brings_no_more_tokens(llm: LLM) -> None:
    engine = with_scheduler(llm).engine
    for name in ("stays", "goes"):
        engine.add_request(name, [10, 11, 12], greedy(6))
    engine.step()
    engine.abort("goes")
    engine.abort("never heard of")
    names = set()
    while engine.has_unfinished_requests:
        names |= {output.request_id for output in engine.step().outputs}
    assert names == {"stays"}


def test_the_same_request_id_twice_is_refused_while_the_first_runs(llm: LLM) -> None:
    engine = with_scheduler(llm).engine
    engine.add_request("0", [10], greedy(1))
    with pytest.raises(ValueError, match="'0' is in use"):
        engine.add_request("0", [10], greedy(1))
    while engine.has_unfinished_requests:
        engine.step()
    engine.add_request("0", [10], greedy(1))
    engine.abort("0")


def test_a_request_without_a_seed_gets_one_from_the_engines_and_its_name(llm: LLM) -> None:
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert len({derive_seed(0, "a"), derive_seed(1, "a"), derive_seed(0, "b")}) == 3
    engine = with_scheduler(llm).engine
    request = engine.add_request("a", [10], SamplingParams(max_tokens=1))
    assert request.sampling_params.seed == derive_seed(0, "a")
    engine.abort("a")


def fail_once(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    execute, failures = runner.execute, [RuntimeError("the device is out of memory")]

    def failing(*step: Any) -> Any:
        if failures:
            raise failures.pop()
        return execute(*step)

    monkeypatch.setattr(runner, "execute", failing)


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = with_scheduler(llm)
    (prompt,) = random_prompts(40)
    expected = with_scheduler(llm).generate([prompt], greedy(4), use_tqdm=False)
    fail_once(llm.engine.runner, monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        fresh.generate([prompt], greedy(4), use_tqdm=False)
    assert fresh.engine.scheduler.num_in_flight == 0
    # Its blocks were never written: the prefix cache must not offer them.
    again = fresh.generate([prompt], greedy(4), use_tqdm=False)
    assert again[0].num_cached_tokens == 0
    assert again[0].outputs == expected[0].outputs
