"""The host's part of a step: what is timed, what it sums up to, and that it leaves no trace."""

import pytest

from benchmarks.host_steps import PARTS, summary, timed_steps
from jaxengine import LLM
from tests.helpers import greedy


def test_every_step_is_timed_in_all_its_parts(llm: LLM) -> None:
    with timed_steps(llm) as steps:
        llm.generate([[10, 11, 12]], greedy(7), use_tqdm=False)
    assert len(steps) >= 7
    assert {part for step in steps for part in step} == {*PARTS, "step"}
    for step in steps:
        assert sum(step[part] for part in step if part != "step") <= step["step"]


def test_nothing_is_timed_afterwards(llm: LLM) -> None:
    with pytest.raises(KeyError), timed_steps(llm) as steps:
        raise KeyError
    llm.generate([[10, 11, 12]], greedy(3), use_tqdm=False)
    assert steps == []


def test_a_step_that_did_not_wait_is_one_that_the_host_was_late_for() -> None:
    def step(wait: float) -> dict[str, float]:
        return {"dispatch": 0.001, "wait": wait, "step": 0.002 + wait}

    steps = [step(0.5), step(0.5), *[step(0.008)] * 3, step(0.0), step(0.5), step(0.5)]
    record = summary(steps)
    assert record["num_steps"] == 8
    assert record["ahead"] == 0.75  # three of the four that are neither the first nor the last
    assert record["waiting_share"] == 0.75  # 24 of 32 ms
    assert record["ms"]["dispatch"]["median"] == 1.0
