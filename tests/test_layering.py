"""Imports point down: every file is held to one table, and heavy packages load only when needed."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jaxengine", "pallas_kernels", "convert")

TEXT = (
    *("jaxengine.llm", "jaxengine.tokenizer", "jaxengine.detokenizer", "jaxengine.stop_strings"),
    *("jaxengine.output*", "jaxengine.cli*", "jaxengine.server", "transformers", "tokenizers"),
)
DEVICE = ("jax", "jaxlib", "flax", "jaxengine.batch", "jaxengine.sharding", "jaxengine.layers")
MODELS = ("jaxengine.models", "jaxengine.weights")
# What the engine's device half is made of: its host half must not reach for it.
DEVICE_ENGINE = tuple(
    f"jaxengine.engine.{name}"
    for name in (
        *("batch_builder", "buckets", "build", "engine", "kv_cache", "logprobs", "memory"),
        *("model_runner", "prompt_scorer", "replicas", "sampler*", "step", "top_tokens"),
        "truncation",
    )
)

# File pattern -> modules that it must not import; a file obeys every pattern that it matches.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "*": ("torch", "tensorflow", "tests", "benchmarks", "examples"),
    "pallas_kernels/*": ("jaxengine.[!p]*", "flax", "transformers"),
    "convert/*": ("jaxengine.[!c]*", "flax", "transformers"),
    "jaxengine/config.py": ("numpy", "jaxengine", *DEVICE, *TEXT),
    "jaxengine/sampling_params.py": ("numpy", "jaxengine", *DEVICE, *TEXT),
    "jaxengine/outputs.py": ("numpy", *DEVICE, "jaxengine.engine", "transformers"),
    "jaxengine/stop_strings.py": ("numpy", "jaxengine", *DEVICE, "transformers"),
    "jaxengine/tokenizer.py": (*DEVICE, *MODELS, "jaxengine.engine", "jaxengine.convert"),
    "jaxengine/detokenizer.py": (*DEVICE, *MODELS, "jaxengine.engine", "jaxengine.convert"),
    "jaxengine/output_*": ("flax", *MODELS, "jaxengine.engine.engine", "jaxengine.convert"),
    "jaxengine/batch.py": ("jaxengine.[!p]*", *TEXT),
    "jaxengine/sharding.py": ("jaxengine", *TEXT),
    "jaxengine/layers/*": ("jaxengine.engine", *MODELS, *TEXT, "jaxengine.convert"),
    "jaxengine/models/*": ("jaxengine.engine", "jaxengine.weights", *TEXT),
    "jaxengine/models/[!r]*": ("jaxengine.convert", "jaxengine.models.registry"),
    "jaxengine/weights.py": ("jaxengine.engine", "jaxengine.models", *TEXT),
    "jaxengine/engine/*": (*TEXT, "jaxengine.convert", "jaxengine.distributed"),
    "jaxengine/distributed/*": (
        "jaxengine.cli*",
        "jaxengine.on_ray",
        "jaxengine.output*",
        "jaxengine.convert",
    ),
    "jaxengine/distributed/[!f]*": ("jaxengine.llm",),
    **{
        f"jaxengine/distributed/{name}.py": (*DEVICE, *MODELS, "jaxengine.engine", *TEXT, "ray")
        for name in ("channel", "frames", "heartbeat", "identity", "roll_call")
    },
    "jaxengine/llm.py": ("jaxengine.cli*", "jaxengine.server"),
    "jaxengine/cli_*": ("jaxengine.engine",),
    "jaxengine/on_ray/*": (
        *DEVICE,
        *MODELS,
        "jaxengine.engine",
        "jaxengine.cli",
        "jaxengine.convert",
    ),
    **{
        f"jaxengine/on_ray/{name}.py": ("ray",)
        for name in ("engine_thread", "json_output", "output_directory", "sh*")
    },
    **{
        f"jaxengine/engine/{name}.py": (*DEVICE, *MODELS, *DEVICE_ENGINE)
        for name in (
            *("request", "request_limits", "request_queue", "block_*"),
            *("replica_router", "scheduler*", "step_budget", "step_builder"),
        )
    },
}
# The same, for imports at the top of a file only: convert runs where jax is not installed ...
FORBIDDEN_AT_TOP: dict[str, tuple[str, ...]] = {
    "convert/*": ("jax", "orbax", "huggingface_hub"),
}
# ... but for this file, which convert.save imports when it has something to save.
EXEMPT_AT_TOP = ("convert/orbax_handler.py",)


def source_files() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )


def imported_modules(source: str, only_top: bool = False) -> set[str]:
    """Modules that a file imports; of ``from a import b`` both ``a`` and ``a.b``."""
    tree = ast.parse(source)
    nodes = tree.body if only_top else ast.walk(tree)
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules |= {node.module or ""}
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def forbidden_imports(file: str, modules: set[str], table: dict[str, tuple[str, ...]]) -> set[str]:
    """The modules among those that a table forbids to a file."""
    patterns = [
        name for place, names in table.items() if fnmatch.fnmatch(file, place) for name in names
    ]
    return {
        module
        for module in modules
        for pattern in patterns
        if fnmatch.fnmatch(module, pattern) or fnmatch.fnmatch(module, f"{pattern}.*")
    }


@pytest.mark.parametrize("file", source_files())
def test_a_file_imports_only_what_lies_below_it(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert forbidden_imports(file, imported_modules(source), FORBIDDEN) == set()
    if file not in EXEMPT_AT_TOP:
        at_top = imported_modules(source, only_top=True)
        assert forbidden_imports(file, at_top, FORBIDDEN_AT_TOP) == set()


def test_only_weights_the_registry_and_the_command_line_import_convert() -> None:
    assert engine_files_that_import("jaxengine.convert") == {
        "jaxengine/weights.py",
        "jaxengine/models/registry.py",
        "jaxengine/cli.py",
    }


def test_only_layers_call_kernels() -> None:
    # ``peers`` is data that kernels and those who keep the memory share.
    callers = engine_files_that_import(
        "jaxengine.pallas_kernels", but="jaxengine.pallas_kernels.peers"
    )
    assert {Path(file).parent.as_posix() for file in callers} == {"jaxengine/layers"}


def test_ray_is_imported_where_it_is_wanted_and_nobody_imports_on_ray() -> None:
    importers = engine_files_that_import("ray")
    outside = {file for file in importers if not file.startswith("jaxengine/on_ray/")}
    assert outside == {"jaxengine/distributed/ray_cluster.py"}
    for file in source_files():
        modules = imported_modules((ROOT / file).read_text(encoding="utf-8"))
        if not file.startswith("jaxengine/on_ray/"):
            assert not any(module.startswith("jaxengine.on_ray") for module in modules), file


def engine_files_that_import(package: str, but: str = "") -> set[str]:
    return {
        file
        for file in source_files()
        if file.startswith("jaxengine/")
        for module in imported_modules((ROOT / file).read_text(encoding="utf-8"))
        if f"{module}.".startswith(f"{package}.")
        and not (but and f"{module}.".startswith(f"{but}."))
    }


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("jaxengine/engine/scheduler.py", "import jax.numpy as jnp"),
        ("jaxengine/engine/block_pool.py", "from jaxengine.engine import model_runner"),
        ("jaxengine/engine/engine.py", "def f():\n    from jaxengine.tokenizer import Tokenizer"),
        ("jaxengine/models/llama.py", "from jaxengine import convert"),
        ("jaxengine/llm.py", "import torch"),
        ("pallas_kernels/new_kernel.py", "from jaxengine.batch import InputBatch"),
    ],
)
def test_the_table_catches_an_import_that_points_up(file: str, source: str) -> None:
    assert forbidden_imports(file, imported_modules(source), FORBIDDEN)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import jaxengine; jaxengine.SamplingParams; jaxengine.EngineConfig", "jax numpy"),
        ("import jaxengine.engine.scheduler", "jax flax transformers torch"),
        ("import jaxengine.convert.__main__", "jax orbax flax transformers torch"),
        ("import jaxengine.pallas_kernels.paged_attention", "flax transformers torch"),
        ("import jaxengine.cli", "jax flax transformers torch"),
    ],
)
def test_an_import_does_not_load(statement: str, absent: str) -> None:
    loaded = _run(f"{statement}; import sys; print(*sys.modules)").split()
    assert set(absent.split()) & set(loaded) == set()


GENERATE_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # makes every import of it fail

import jaxengine.tokenizer
from jaxengine import LLM, SamplingParams

llm = LLM(
    "benchmarks/models/llama-3.1-8b",
    load_format="dummy",
    hf_overrides={
        "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    },
    max_num_seqs=1,
    num_gpu_blocks_override=8,
    skip_tokenizer_init=True,
)
(output,) = llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
print(len(output.outputs[0].token_ids))
"""


def test_tokens_are_generated_where_torch_cannot_be_imported() -> None:
    assert _run(GENERATE_WITHOUT_TORCH).split() == ["4"]


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout
