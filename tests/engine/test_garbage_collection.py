"""What the start and each step make does not set Python's garbage collector to work."""

import gc
from pathlib import Path

import pytest

from jaxengine.engine.engine import Engine
from jaxengine.engine.garbage_collection import (
    exempt_from_garbage_collection,
    paused_garbage_collection,
)
from jaxengine.engine.step_news import StepNews
from tests.helpers import greedy, make_llm


class Cycle:
    """Something that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


def num_cycles() -> int:
    return sum(type(each) is Cycle for each in gc.get_objects())


def test_what_is_there_is_left_out_until_its_owner_is_gone() -> None:
    Cycle()  # garbage is not kept
    kept = Cycle()
    owner = Cycle.__new__(Cycle)
    exempt_from_garbage_collection(owner)
    assert num_cycles() == 0  # what is left out is not even listed
    del kept
    gc.collect()
    assert gc.get_freeze_count() > 0
    del owner
    assert gc.get_freeze_count() == 0
    assert num_cycles() == 1
    gc.collect()
    assert num_cycles() == 0


def test_an_engine_that_is_gone_leaves_nothing_out(chat_model: Path) -> None:
    llm = make_llm(chat_model)
    assert gc.get_freeze_count() > 1000
    del llm
    assert gc.get_freeze_count() == 0


def test_no_step_is_interrupted(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was_enabled: list[bool] = []
    step = Engine.step

    def spy(self: Engine) -> StepNews:
        was_enabled.append(gc.isenabled())
        return step(self)

    monkeypatch.setattr(Engine, "step", spy)
    make_llm(chat_model).generate([[10, 11, 12]], greedy(8), use_tqdm=False)
    assert len(was_enabled) >= 8
    assert not any(was_enabled)
    assert gc.isenabled()


def test_an_error_leaves_the_garbage_collector_on() -> None:
    with pytest.raises(MemoryError), paused_garbage_collection():
        raise MemoryError
    assert gc.isenabled()


def test_who_has_switched_the_garbage_collector_off_finds_it_off() -> None:
    gc.disable()
    try:
        with paused_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
