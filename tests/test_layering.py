"""Imports point down: every file is held to one table, and heavy packages load only when needed."""

import ast
import fnmatch
import graphlib
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("jaxengine", "pallas_kernels", "convert")

# What knows strings and users.
OUTSIDE = (
    *("jaxengine.llm", "jaxengine.text", "jaxengine.cli", "jaxengine.server", "jaxengine.on_ray"),
    *("jaxengine.engine_thread", "jaxengine.async_llm", "jaxengine.loaded_engine"),
    *("transformers", "tokenizers"),
)
DEVICE = (
    *("jax", "jaxlib", "flax", "jaxengine.batch", "jaxengine.sharding", "jaxengine.layers"),
    "jaxengine.pallas_kernels",
)
MODELS = ("jaxengine.models", "jaxengine.weights", "jaxengine.convert")
# What puts an engine together, and drives it.
WHOLE_ENGINE = tuple(f"jaxengine.engine.{name}" for name in ("build", "engine", "replicas"))

# File pattern -> modules that it must not import; a file obeys every pattern that it matches.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "*": ("torch", "tensorflow", "tests", "benchmarks", "examples"),
    "pallas_kernels/*": ("flax", "transformers"),
    "convert/*": ("flax", "transformers"),
    "jaxengine/config.py": ("numpy", "jaxengine", *DEVICE, *OUTSIDE),
    "jaxengine/sampling_params.py": ("numpy", "jaxengine.engine", *DEVICE, *MODELS, *OUTSIDE),
    "jaxengine/outputs.py": ("numpy", *DEVICE, *MODELS, "jaxengine.engine", *OUTSIDE),
    "jaxengine/batch.py": ("jaxengine.engine", "jaxengine.layers", *MODELS, *OUTSIDE),
    "jaxengine/sharding.py": ("jaxengine.engine", "jaxengine.layers", *MODELS, *OUTSIDE),
    "jaxengine/model_config.py": (
        "numpy",
        "jaxengine.engine",
        "jaxengine.models",
        *DEVICE,
        *OUTSIDE,
    ),
    "jaxengine/layers/*": ("jaxengine.engine", "jaxengine.models", "jaxengine.weights", *OUTSIDE),
    "jaxengine/models/*": ("jaxengine.engine", "jaxengine.weights", *OUTSIDE),
    "jaxengine/models/[!r]*": ("jaxengine.models.registry",),
    "jaxengine/weights.py": ("jaxengine.engine", "jaxengine.models", *OUTSIDE),
    "jaxengine/engine/*": (*OUTSIDE, "jaxengine.convert", "jaxengine.distributed"),
    "jaxengine/engine/scheduling/*": DEVICE,
    "jaxengine/engine/sampling/*": WHOLE_ENGINE,
    "jaxengine/engine/device/*": WHOLE_ENGINE,
    "jaxengine/engine/replica_router.py": (*DEVICE, *MODELS, *WHOLE_ENGINE),
    "jaxengine/research/*": (*OUTSIDE, *WHOLE_ENGINE, "jaxengine.distributed"),
    "jaxengine/process.py": (*OUTSIDE, *MODELS, *WHOLE_ENGINE, "jaxengine.distributed"),
    "jaxengine/text/*": (
        *("jaxengine.llm", "jaxengine.cli", "jaxengine.server", "jaxengine.distributed"),
        *(*DEVICE, *MODELS, *WHOLE_ENGINE, "jaxengine.engine.device"),
    ),
    "jaxengine/text/*tokenizer.py": ("jaxengine.engine",),
    "jaxengine/server/parsers/*": (*DEVICE, "numpy", "transformers"),
    "jaxengine/structured/*": (*DEVICE, *MODELS, *OUTSIDE[:-2], "jaxengine.engine"),
    "jaxengine/text/stop_strings.py": ("numpy", "jaxengine", "transformers"),
    "jaxengine/distributed/*": (*OUTSIDE, "jaxengine.convert"),
    **{
        f"jaxengine/distributed/{name}.py": (*DEVICE, *MODELS, "jaxengine.engine", "ray")
        for name in ("channel", "frames", "heartbeat", "identity", "roll_call")
    },
    "jaxengine/pooling/*": ("jaxengine.llm", "jaxengine.cli", "jaxengine.server", "transformers"),
    "jaxengine/pooling/[!em]*": OUTSIDE,
    "jaxengine/pooling/runner.py": ("jaxengine.convert", "jaxengine.engine"),
    "jaxengine/engine_client.py": (*DEVICE, *MODELS, *WHOLE_ENGINE, *OUTSIDE),
    "jaxengine/engine_loop.py": (*DEVICE, *MODELS, *WHOLE_ENGINE, *OUTSIDE),
    "jaxengine/server/*": (*MODELS, *WHOLE_ENGINE, "jaxengine.cli", "jaxengine.on_ray"),
    "jaxengine/server/[!e]*": (*DEVICE, "jaxengine.loaded_engine", "jaxengine.llm"),
    "jaxengine/async_llm.py": (*DEVICE, *MODELS, *WHOLE_ENGINE, "jaxengine.server", "transformers"),
    "jaxengine/llm.py": ("jaxengine.cli", "jaxengine.server", "jaxengine.convert"),
    "jaxengine/cli/*": ("jaxengine.engine",),
    "jaxengine/engine_thread.py": (*DEVICE, *MODELS, "jaxengine.engine", "jaxengine.cli"),
    "jaxengine/on_ray/*": (*DEVICE, *MODELS, "jaxengine.engine", "jaxengine.cli.[!a]*"),
    **{
        f"jaxengine/on_ray/{name}.py": ("ray",)
        for name in ("json_output", "output_directory", "sh*")
    },
}
# File pattern -> all of our own modules that it may import.
OF_OURS: dict[str, tuple[str, ...]] = {
    "pallas_kernels/*": ("jaxengine.pallas_kernels",),
    "convert/*": ("jaxengine.convert",),
    "jaxengine/sampling_params.py": (
        "jaxengine.structured.params",
        "jaxengine.compat.sampling_fields",
    ),
    **{
        f"jaxengine/compat/{name}.py": ("jaxengine.compat", "jaxengine.config")
        for name in ("engine_args", "sampling_fields", "model_config", "names", "similar_names")
    },
    "jaxengine/structured/params.py": (),
    "jaxengine/pooling/params.py": (),
    "jaxengine/pooling/outputs.py": (),
    "jaxengine/server/parsers/*": ("jaxengine.server.parsers", "jaxengine.structured"),
    "jaxengine/engine/scheduling/*": ("jaxengine.engine.scheduling", "jaxengine.sampling_params"),
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
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
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


def foreign_imports(file: str, modules: set[str]) -> set[str]:
    """Those of our modules that are not among the few a file may import."""
    return {
        module
        for place, names in OF_OURS.items()
        if fnmatch.fnmatch(file, place)
        for module in modules
        if f"{module}.".startswith("jaxengine.")
        and not f"{module}.".startswith(tuple(f"{name}." for name in names))
    }


@pytest.mark.parametrize("file", source_files())
def test_a_file_imports_only_what_lies_below_it(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert forbidden_imports(file, imported_modules(source), FORBIDDEN) == set()
    assert foreign_imports(file, imported_modules(source)) == set()
    if file not in EXEMPT_AT_TOP:
        at_top = imported_modules(source, only_top=True)
        assert forbidden_imports(file, at_top, FORBIDDEN_AT_TOP) == set()


def test_only_those_who_read_checkpoints_or_their_names_import_convert() -> None:
    # The spec is what the readers of configs and those who compute share.
    importers = engine_files_that_import("jaxengine.convert", but="jaxengine.convert.model_spec")
    assert importers == {
        "jaxengine/model_config.py",
        "jaxengine/weights.py",
        "jaxengine/models/registry.py",
        "jaxengine/pooling/pooler.py",  # files of sentence-transformers beside the weights
        "jaxengine/cli/main.py",
        "jaxengine/research/checkpoint_arrays.py",
        "jaxengine/research/updates.py",
    }


def test_only_layers_call_kernels() -> None:
    # Data that kernels share with those who keep memory, and with those who choose programs; and
    # what those who compile programs do when a kernel fails.
    names = ("peers", "operands", "target", "failures")
    data = tuple(f"jaxengine.pallas_kernels.{name}" for name in names)
    callers = engine_files_that_import("jaxengine.pallas_kernels", but=data)
    assert {Path(file).parent.as_posix() for file in callers} == {"jaxengine/layers"}


def test_ray_is_imported_where_it_is_wanted_and_nobody_imports_on_ray() -> None:
    importers = engine_files_that_import("ray")
    outside = {file for file in importers if not file.startswith("jaxengine/on_ray/")}
    assert outside == {"jaxengine/distributed/ray_cluster.py"}
    for file in source_files():
        modules = imported_modules((ROOT / file).read_text(encoding="utf-8"))
        if not file.startswith("jaxengine/on_ray/"):
            assert not any(module.startswith("jaxengine.on_ray") for module in modules), file


def engine_files_that_import(package: str, but: str | tuple[str, ...] = ()) -> set[str]:
    exempt = (but,) if isinstance(but, str) else but
    return {
        file
        for file in source_files()
        if file.startswith("jaxengine/")
        for module in imported_modules((ROOT / file).read_text(encoding="utf-8"))
        if f"{module}.".startswith(f"{package}.")
        and not f"{module}.".startswith(tuple(f"{name}." for name in exempt))
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    assert "jaxengine.distributed.launch" in graph["jaxengine.loaded_engine"]
    assert "jaxengine.convert.rules" in graph["jaxengine.convert.families.family"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def import_graph() -> dict[str, set[str]]:
    """Our modules, and those of them that each imports when it is imported itself.

    Imports within functions come later, those for type checkers never. A package counts only where
    it is imported for its own names: its modules may import each other's neighbours.
    """
    files = {module_name(file): ROOT / file for file in source_files()}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        imports = [*imports_at_start(ast.parse(path.read_text(encoding="utf-8")).body)]
        graph[module] = {name for each in imports for name in imported_files(each, files)}
    return graph


def module_name(file: str) -> str:
    path = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return path if path.split(".")[0] == "jaxengine" else f"jaxengine.{path}"


def imports_at_start(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_at_start(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for field in ("body", "orelse", "handlers", "finalbody"):
                for part in getattr(node, field, []):
                    inner = part.body if isinstance(part, ast.ExceptHandler) else [part]
                    yield from imports_at_start(inner)


def imported_files(node: ast.Import | ast.ImportFrom, files: Container[str]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in files}
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name if name in files else str(node.module) for name in inner}
    return {name for name in names if name in files}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("jaxengine/engine/scheduling/scheduler.py", "import jax.numpy as jnp"),
        ("jaxengine/engine/scheduling/block_pool.py", "from jaxengine.engine.device import memory"),
        (
            "jaxengine/engine/engine.py",
            "def f():\n    from jaxengine.text.tokenizer import Tokenizer",
        ),
        ("jaxengine/models/decoder.py", "from jaxengine.models import registry"),
        ("jaxengine/llm.py", "import torch"),
        ("pallas_kernels/new_kernel.py", "from jaxengine.batch import InputBatch"),
    ],
)
def test_the_table_catches_an_import_that_points_up(file: str, source: str) -> None:
    modules = imported_modules(source)
    assert forbidden_imports(file, modules, FORBIDDEN) | foreign_imports(file, modules)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import jaxengine; jaxengine.SamplingParams; jaxengine.EngineConfig", "jax numpy"),
        ("import jaxengine.engine.scheduling.scheduler", "jax flax transformers torch"),
        ("import jaxengine.convert.__main__", "jax orbax flax transformers torch"),
        ("import jaxengine.pallas_kernels.paged_attention", "flax transformers torch"),
        ("import jaxengine.cli.main", "jax flax transformers torch"),
        ("import jaxengine.text.output_processor", "jax flax transformers torch"),
        ("import jaxengine.async_llm", "jax flax transformers torch"),
        ("import jaxengine.server.launcher", "jax flax transformers torch"),
    ],
)
def test_an_import_does_not_load(statement: str, absent: str) -> None:
    loaded = _run(f"{statement}; import sys; print(*sys.modules)").split()
    assert set(absent.split()) & set(loaded) == set()


GENERATE_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # makes every import of it fail

import jaxengine.text.tokenizer
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
