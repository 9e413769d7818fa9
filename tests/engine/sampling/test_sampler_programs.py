"""Compiling samplers in the background gives way to an engine that is at work."""

import time
import types
from typing import Any

import jax
import pytest

from jaxengine import SamplingParams
from jaxengine.engine.sampling import sampler_programs
from jaxengine.engine.sampling.sampler_programs import (
    COMMON_VARIANTS,
    IDLE_S,
    MASKED_VARIANTS,
    MAX_WAIT_S,
    SamplerPrograms,
)
from jaxengine.sharding import make_mesh
from tests.helpers import greedy, make_llm


class Clock:
    """Time that passes in ``sleep`` only; the engine makes steps until ``busy_until``."""

    def __init__(self, busy_until: float) -> None:
        self.now, self.busy_until = 100.0, 100.0 + busy_until
        self.programs: SamplerPrograms | None = None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.programs is not None and self.now < self.busy_until:
            self.programs.note_step()


def compile_times(
    monkeypatch: pytest.MonkeyPatch,
    busy_until: float,
    first_sampled: float = float("inf"),
    row_counts: tuple[int, ...] = (1, 2),
) -> list[float]:
    """Seconds after the start at which each program is compiled."""
    clock = Clock(busy_until)
    fake = types.SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(sampler_programs, "time", fake)
    mesh = make_mesh(jax.devices()[:1])
    programs = SamplerPrograms(mesh, vocab_size=8, max_num_seqs=4, dtype="float32")
    times: list[float] = []

    def compile_one(*_: Any) -> None:
        times.append(clock.now - 100.0)

    monkeypatch.setattr(programs, "_program", compile_one)
    programs._first_sampled = 100.0 + first_sampled
    if busy_until:
        clock.programs = programs
        programs.note_step()
    programs._warm_up(row_counts)
    return times


def test_an_idle_engine_does_not_delay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_times(monkeypatch, busy_until=0) == [0.0] * 2 * len(COMMON_VARIANTS)


def test_samplers_with_masks_come_too_where_there_are_rows_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = compile_times(monkeypatch, busy_until=0, row_counts=(1, 4, 8))
    assert len(times) == 3 * len(COMMON_VARIANTS) + 2 * len(MASKED_VARIANTS)


def test_it_waits_until_the_engine_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    times = compile_times(monkeypatch, busy_until=1.0)
    assert times == pytest.approx([1.0 + IDLE_S] * 6, abs=IDLE_S / 2)


def test_an_engine_that_samples_and_never_rests_only_slows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = compile_times(monkeypatch, busy_until=1000.0, first_sampled=10.0)
    expected = [10.0 + MAX_WAIT_S * (number + 1) for number in range(6)]
    assert times == pytest.approx(expected, abs=6 * IDLE_S / 4)  # sleeps may end a little late


def test_an_engine_that_never_samples_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = compile_times(monkeypatch, busy_until=1000.0)
    assert min(times) == pytest.approx(1000.0 + IDLE_S, abs=IDLE_S)


def test_a_batch_that_is_sampled_is_noted(chat_model: Any) -> None:
    llm = make_llm(chat_model)
    samplers = llm.engine.runner._samplers
    llm.generate([[5, 6, 7]], greedy(3), use_tqdm=False)
    assert samplers._first_sampled == float("inf")
    llm.generate([[5, 6, 7]], SamplingParams(temperature=1.0, max_tokens=3), use_tqdm=False)
    assert samplers._first_sampled <= time.monotonic()
