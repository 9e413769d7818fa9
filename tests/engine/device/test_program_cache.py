"""Compiled steps are found again by another engine, and only by one that would make the same."""

import functools
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxengine import LLM
from jaxengine.batch import StepShape
from jaxengine.engine.device import program_cache
from jaxengine.engine.device.program_cache import ProgramCache, cache_directory
from jaxengine.engine.device.stage import CompiledStep, LoweredStep, Stage
from jaxengine.engine.sampling.sampler_programs import COMMON_VARIANTS, SamplerPrograms
from jaxengine.sharding import make_mesh
from tests.helpers import greedy, make_llm

PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22]]
DECODE = StepShape(4, 4, decode_only=True)
MIXED = StepShape(16, 4, decode_only=False)


def with_cache(
    model: Path, directory: Path, facts: Sequence[object] = ("a model",), **options: Any
) -> LLM:
    """An engine whose steps are kept; on a CPU none are unless a test says so."""
    llm = make_llm(model, **options)
    (stage,) = llm.engine.runner.stages
    stage.program_cache = ProgramCache(directory, jax.devices()[:1], facts)
    return llm


@pytest.fixture
def clear_jax_cache(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Gives jax's own cache an empty directory: what it had is not kept a second time."""
    before = jax.config.values["jax_compilation_cache_dir"]
    numbers = itertools.count()

    def use(directory: str) -> None:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()

    yield lambda: use(str(tmp_path / f"jax{next(numbers)}"))
    use(before)


@pytest.fixture(autouse=True)
def with_empty_jax_cache(clear_jax_cache: Callable[[], None]) -> None:
    clear_jax_cache()


def generate(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, greedy(6), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """Shapes that were compiled rather than loaded."""
    shapes: list[StepShape] = []
    compile_step = Stage.compile

    def spy(self: Stage, step: LoweredStep) -> CompiledStep:
        shapes.append(step.shape)
        return compile_step(self, step)

    monkeypatch.setattr(Stage, "compile", spy)
    return shapes


def test_the_second_engine_compiles_nothing(
    chat_model: Path, tmp_path: Path, compiled: list[StepShape]
) -> None:
    expected = generate(with_cache(chat_model, tmp_path))
    assert compiled
    compiled.clear()
    llm = with_cache(chat_model, tmp_path)
    assert generate(llm) == expected
    assert generate(llm) == expected  # its buffers were donated: a second call finds new ones
    assert not compiled


def test_a_loaded_step_still_updates_the_cache_in_place(chat_model: Path, tmp_path: Path) -> None:
    with_cache(chat_model, tmp_path).engine.runner.stages[0].program(DECODE)
    llm = with_cache(chat_model, tmp_path)
    (stage,) = llm.engine.runner.stages
    memory: Any = stage.program(DECODE).memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(stage.state.caches))
    before = jax.tree.leaves(stage.state.caches)
    generate(llm)
    assert all(array.is_deleted() for array in before)


@pytest.mark.parametrize(
    "change", ["facts", "num_blocks", "shape", "hidden", "flags", "source", "devices"]
)
def test_whatever_changes_the_program_changes_its_name(
    change: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    compiled: list[StepShape],
) -> None:  # fmt: skip
    with_cache(chat_model, tmp_path).engine.runner.stages[0].program(DECODE)
    (stage,) = with_cache(chat_model, tmp_path).engine.runner.stages
    shape, returns_hidden, devices, facts = DECODE, False, jax.devices()[:1], ("a model",)
    if change == "facts":
        facts = ("another model",)
    elif change == "num_blocks":
        stage.set_num_blocks(stage.num_blocks + 1)
    elif change == "shape":
        shape = StepShape(8, 8, decode_only=True)
    elif change == "hidden":
        returns_hidden = True
    elif change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    elif change == "source":
        monkeypatch.setattr("jaxengine.engine.device.program_cache.source_digest", lambda: "other")
    elif change == "devices":
        devices = devices * 2
    stage.program_cache = ProgramCache(tmp_path, devices, facts)
    compiled.clear()
    stage.program(shape, returns_hidden)
    assert compiled == [shape]


def test_what_jax_had_already_is_not_kept_again(chat_model: Path, tmp_path: Path) -> None:
    with_cache(chat_model, tmp_path / "one").engine.runner.stages[0].program(DECODE)
    assert len(list((tmp_path / "one").iterdir())) == 1
    with_cache(chat_model, tmp_path / "two").engine.runner.stages[0].program(DECODE)
    assert not (tmp_path / "two").exists()


def test_a_start_keeps_every_step_once(
    chat_model: Path, tmp_path: Path, compiled: list[StepShape]
) -> None:
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 32}
    jax_cache = Path(jax.config.values["jax_compilation_cache_dir"])
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        with_cache(chat_model, tmp_path / "one").engine.runner.stages[0].program(DECODE)
        assert len(list(jax_cache.rglob("*forward*-cache"))) == 1  # not at the start: in both
        compiled.clear()
        for _ in range(2):
            llm = with_cache(chat_model, tmp_path / "steps", **limits)
            runner = llm.engine.runner
            runner.compile_all(show_progress=False)
            assert len(compiled) == len(runner._buckets.all_shapes())  # all of them the first time
            assert len(list((tmp_path / "steps").iterdir())) == len(compiled)
            assert len(list(jax_cache.rglob("*forward*-cache"))) == 1
            assert len(generate(llm)) == len(PROMPTS)
        assert jax.config.values[name] == 0
    finally:
        jax.config.update(name, before)


def test_what_was_not_used_for_longest_gives_way(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[StepShape]
) -> None:
    (stage,) = with_cache(chat_model, tmp_path).engine.runner.stages
    cache = stage.program_cache
    sizes = [StepShape(rows, rows, decode_only=True) for rows in (1, 2, 4)]
    paths = [cache.path(stage._facts(shape, False)) for shape in sizes]
    for number, (shape, path) in enumerate(zip(sizes, paths, strict=True)):
        stage.program(shape)
        os.utime(path, (1000 + number, 1000 + number))
    (again,) = with_cache(chat_model, tmp_path).engine.runner.stages
    compiled.clear()
    again.program(sizes[0])  # now it is the one that was used last
    assert not compiled
    monkeypatch.setattr(program_cache, "MAX_BYTES", sum(path.stat().st_size for path in paths))
    again.program(MIXED)
    left = set(tmp_path.glob("*.step"))
    assert paths[0] in left
    assert paths[1] not in left
    assert cache.path(again._facts(MIXED, False)) in left
    assert sum(path.stat().st_size for path in left) <= program_cache.MAX_BYTES


def test_samplers_are_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(jax.devices()[:1])
    num_compiled = []

    def lower(*args: Any) -> Any:
        num_compiled.append(args)
        return SamplerPrograms._lower(*args)

    outputs = []
    for _ in range(2):
        cache = ProgramCache(tmp_path / "steps", jax.devices()[:1], ())
        programs = SamplerPrograms(
            mesh, vocab_size=16, max_num_seqs=4, dtype="float32", program_cache=cache
        )
        monkeypatch.setattr(programs, "_lower", functools.partial(lower, programs))
        assert programs.temp_bytes(2) > 0
        program = programs._program(COMMON_VARIANTS[0], 2)
        outputs.append(program.memory_analysis().argument_size_in_bytes)  # type: ignore[union-attr]
    assert len(num_compiled) == 2  # both of the first run
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("damage", [b"", b"nonsense", "half"])
def test_a_damaged_file_is_replaced(
    damage: Any, chat_model: Path, tmp_path: Path, compiled: list[StepShape],
    caplog: pytest.LogCaptureFixture, clear_jax_cache: Callable[[], None],
) -> None:  # fmt: skip
    with_cache(chat_model, tmp_path).engine.runner.stages[0].program(DECODE)
    (file,) = tmp_path.glob("*.step")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "half" else damage)
    compiled.clear()
    clear_jax_cache()
    with caplog.at_level(logging.WARNING):
        with_cache(chat_model, tmp_path).engine.runner.stages[0].program(DECODE)
    assert compiled == [DECODE]
    assert str(file) in caplog.text
    compiled.clear()
    with_cache(chat_model, tmp_path).engine.runner.stages[0].program(DECODE)
    assert not compiled


def test_a_directory_that_cannot_be_written_is_no_error(
    chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    llm = with_cache(chat_model, tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        assert generate(llm)
    assert caplog.text.count("cannot be kept") == 1  # not once a step


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_what_mosaic_kernels_call_is_there_before_one_is_loaded(platform: str) -> None:
    code = (
        "import sys, types\n"
        "from jaxengine.engine.device.program_cache import MOSAIC_RUNTIME, ProgramCache\n"
        "client = types.SimpleNamespace(platform_version='1')\n"
        f"device = dict(client=client, id=0, device_kind='a GPU', platform='{platform}')\n"
        "ProgramCache('/somewhere', [types.SimpleNamespace(**device)], ())\n"
        "print(MOSAIC_RUNTIME in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(platform == "gpu")


def test_names_are_the_same_in_every_process(chat_model: Path) -> None:
    """Nothing in the description of a model may depend on addresses or the order of sets."""
    code = (
        "import sys, jax\n"
        "from jaxengine.engine import build\n"
        "build.ProgramCache = lambda directory, devices, facts: print(repr(facts))\n"
        "build.cache_directory = lambda: '/'\n"
        "build.StageParts.is_on_cpu = False\n"
        "from tests.helpers import make_llm\n"
        "make_llm(sys.argv[1])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(chat_model)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    (text,) = outputs
    assert "ModelConfig(" in text
    assert "ParamSpec(" in text
    assert " at 0x" not in text


@pytest.mark.parametrize(
    ("directory", "is_on", "expected"),
    [
        ("/somewhere", True, Path("/somewhere/steps")),
        (None, True, None),
        ("/somewhere", False, None),
    ],
)
def test_steps_are_kept_where_jax_keeps_its_programs(
    directory: str | None, is_on: bool, expected: Path | None
) -> None:
    wanted = {"jax_compilation_cache_dir": directory, "jax_enable_compilation_cache": is_on}
    before = {name: jax.config.values[name] for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        assert cache_directory() == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
