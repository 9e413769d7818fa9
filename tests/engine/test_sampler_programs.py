"""Compiling samplers in the background gives way to an engine that is at work."""

import types
from typing import Any

import pytest

from jaxengine.engine import sampler_programs
from jaxengine.engine.sampler_programs import COMMON_VARIANTS, IDLE_S, MAX_WAIT_S, SamplerPrograms
from jaxengine.sharding import make_mesh


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


def compile_times(monkeypatch: pytest.MonkeyPatch, busy_until: float) -> list[float]:
    """Seconds after the start at which each program is compiled."""
    import jax

    clock = Clock(busy_until)
    fake = types.SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(sampler_programs, "time", fake)
    mesh = make_mesh(jax.devices()[:1])
    programs = SamplerPrograms(mesh, vocab_size=8, max_num_seqs=4, dtype="float32")
    times: list[float] = []

    def compile_one(*_: Any) -> None:
        times.append(clock.now - 100.0)

    monkeypatch.setattr(programs, "_program", compile_one)
    if busy_until:
        clock.programs = programs
        programs.note_step()
    programs._warm_up([1, 2])
    return times


def test_an_idle_engine_does_not_delay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_times(monkeypatch, busy_until=0) == [0.0] * 2 * len(COMMON_VARIANTS)


def test_it_waits_until_the_engine_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    times = compile_times(monkeypatch, busy_until=1.0)
    assert times == pytest.approx([1.0 + IDLE_S] * 6, abs=IDLE_S / 2)


def test_an_engine_that_never_rests_only_slows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = compile_times(monkeypatch, busy_until=1000.0)
    expected = [MAX_WAIT_S * (number + 1) for number in range(6)]
    assert times == pytest.approx(expected, abs=6 * IDLE_S / 4)  # sleeps may end a little late
