"""All steps are compiled at start: traced one at a time, compiled side by side."""

import dataclasses
import gc
import os
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from jaxengine.batch import StepShape
from jaxengine.engine.device import stage as stage_module
from jaxengine.engine.device.compiler_options import compiles_slowly
from jaxengine.engine.device.model_runner import ModelRunner
from jaxengine.engine.device.stage import CompiledStep, LoweredStep, Stage
from tests.helpers import make_llm


class Compiler:
    """Stands in for jax: counts who traces and who compiles at the same time."""

    def __init__(self) -> None:
        self.traced: list[StepShape] = []
        self.collects: set[bool] = set()  # whether garbage was collected meanwhile
        self.num_tracing = self.most_tracing = self.num_compiling = self.most_compiling = 0
        self._lock = threading.Lock()

    def make_forward(self, shape: StepShape, **_: Any) -> Any:
        compiler = self

        class Forward:
            def lower(self, *_: Any) -> "Forward":
                with compiler._lock:
                    compiler.traced.append(shape)
                    compiler.collects.add(gc.isenabled())
                    compiler.num_tracing += 1
                    compiler.most_tracing = max(compiler.most_tracing, compiler.num_tracing)
                time.sleep(0.01)
                with compiler._lock:
                    compiler.num_tracing -= 1
                return self

            def compile(self, _: Any) -> str:
                with compiler._lock:
                    compiler.num_compiling += 1
                    compiler.most_compiling = max(compiler.most_compiling, compiler.num_compiling)
                time.sleep(0.1)
                with compiler._lock:
                    compiler.num_compiling -= 1
                return f"{shape.num_tokens} tokens"

        return Forward()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    compiler = Compiler()
    monkeypatch.setattr(stage_module, "make_forward", compiler.make_forward)
    return compiler


def compile_all(chat_model: Path) -> ModelRunner:
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    runner = make_llm(chat_model, **limits).engine.runner
    runner.compile_all(show_progress=False)
    return runner


def test_steps_are_traced_one_at_a_time_and_compiled_side_by_side(
    chat_model: Path, compiler: Compiler
) -> None:
    shapes = compile_all(chat_model)._buckets.all_shapes()
    assert len(shapes) > 5
    assert sorted(compiler.traced, key=str) == sorted(shapes, key=str)
    assert compiler.most_tracing == 1
    assert compiler.most_compiling > 1


def test_the_seconds_of_every_step_are_known(chat_model: Path, compiler: Compiler) -> None:
    seconds = compile_all(chat_model).compile_seconds
    assert set(seconds) == set(compiler.traced)
    assert min(seconds.values()) > 0


def test_what_compiles_slowly_goes_first(chat_model: Path, compiler: Compiler) -> None:
    compile_all(chat_model)
    is_slow = [compiles_slowly(shape.num_tokens) for shape in compiler.traced]
    assert 0 < sum(is_slow) < len(is_slow)
    assert is_slow == sorted(is_slow, reverse=True)
    slow = compiler.traced[: sum(is_slow)]
    assert slow == sorted(slow, key=lambda shape: shape.num_tokens, reverse=True)


def test_garbage_is_not_collected_while_steps_are_traced(
    chat_model: Path, compiler: Compiler
) -> None:
    compile_all(chat_model)
    assert compiler.collects == {False}
    assert gc.isenabled()


def test_programs_are_written_down_when_all_is_traced(chat_model: Path, compiler: Compiler) -> None:
    stored: list[tuple[Any, int]] = []  # program, shapes traced by then
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    runner = make_llm(chat_model, **limits).engine.runner
    runner.stages[0].program_cache = types.SimpleNamespace(
        load=lambda facts: None,
        store=lambda facts, program: stored.append((program, len(compiler.traced))),
    )
    runner.compile_all(show_progress=False)
    assert sorted(program for program, _ in stored) == sorted(
        f"{shape.num_tokens} tokens" for shape in runner._buckets.all_shapes()
    )
    assert {number for _, number in stored} == {len(compiler.traced)}


def test_a_step_that_does_not_compile_is_an_error(
    chat_model: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stage, step: LoweredStep) -> CompiledStep:
        raise RuntimeError(f"{step.shape.num_tokens} tokens are too many")

    monkeypatch.setattr(Stage, "compile", fail)
    with pytest.raises(RuntimeError, match="are too many"):
        compile_all(chat_model)


def test_the_start_prints_the_seconds_of_every_step(chat_model: Path) -> None:
    startup = make_llm(chat_model).startup
    assert "steps compile when they are first needed" in startup.text()
    seconds = {
        StepShape(64, 64, decode_only=False): 1.25,
        StepShape(512, 32, decode_only=False): 20.0,
        StepShape(64, 64, decode_only=True): 0.5,
        **{StepShape(rows, rows, decode_only=True): 3.0 for rows in range(1000, 1020)},
    }
    text = dataclasses.replace(startup, compile_s=25.0, compile_seconds=seconds).text()
    assert "23 step programs in 25.0 s, each in seconds" in text
    assert "    prefill, tokens x rows: 64x64: 1.2, 512x32: 20.0\n" in text
    assert "    decoding, rows: 64: 0.5, 1000: 3.0, 1001: 3.0" in text
    assert "1019: 3.0" in text
    assert max(map(len, text.splitlines())) <= 100
