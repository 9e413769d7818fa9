import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxengine.convert import convert_checkpoint, open_checkpoint, parameters, save
from jaxengine.convert.__main__ import main
from jaxengine.convert.errors import CheckpointError
from jaxengine.convert.orbax_handler import blocks

from tests.convert.tiny import FAMILIES, assert_same_tree, expected_parameters, save_model
from tests.convert.tiny_gguf import demo_model

Tree = dict[str, np.ndarray]


def load_all(path: Path, dtype: str | None = None) -> Tree:
    return {p.path: p.load() for p in parameters(open_checkpoint(path), dtype)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    save_model(directory)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    return directory


def convert_quietly(source: Path, out: Path, **options: Any) -> Any:
    return convert_checkpoint(source, out, progress=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_has_the_parameters_of_the_original(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "source", family)
    convert_quietly(tmp_path / "source", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").format == "converted"
    assert_same_tree(load_all(tmp_path / "out"), expected_parameters(model))


def test_config_tokenizer_and_generation_config_lie_beside_it(source: Path) -> None:
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    out = source.with_name("out")
    convert_quietly(source, out)
    checkpoint = open_checkpoint(out)
    assert checkpoint.hf_config == open_checkpoint(source).hf_config
    assert checkpoint.tokenizer_files() == {"tokenizer.json": b'{"a": 1}'}
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}


def test_a_conversion_in_another_dtype_says_so_in_its_config(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out, dtype="bfloat16")
    assert open_checkpoint(out).hf_config["torch_dtype"] == "bfloat16"
    assert {values.dtype.name for values in load_all(out).values()} == {"bfloat16"}
    for path, values in load_all(source).items():
        np.testing.assert_array_equal(load_all(out)[path], values.astype(ml_dtypes.bfloat16))


def test_a_converted_model_can_be_converted_again(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    convert_quietly(out, out, dtype="float16", overwrite=True)
    expected = {path: values.astype(np.float16) for path, values in load_all(source).items()}
    assert_same_tree(load_all(out), expected)


def test_the_summary_counts_tensors_and_bytes(source: Path) -> None:
    summary = convert_quietly(source, source.with_name("out"))
    tree = load_all(source)
    assert summary.num_tensors == len(tree)
    assert summary.num_bytes == sum(values.nbytes for values in tree.values())
    assert f"{len(tree)} tensors" in str(summary)
    assert "MB/s" in str(summary)


@pytest.mark.parametrize("checkpointer", ["StandardCheckpointer", "PyTreeCheckpointer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_restores_a_converted_model(source: Path, checkpointer: str, dtype: str) -> None:
    import orbax.checkpoint as ocp

    out = source.with_name("out")
    convert_quietly(source, out, dtype=dtype)
    restored = getattr(ocp, checkpointer)().restore(out / "parameters")
    assert_same_tree(restored, load_all(out))


# Prints the paths whose values differ, in a process with two devices.
SHARDED = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxengine.convert import open_checkpoint, parameters
mesh = jax.make_mesh((2,), ("tp",))
expected = {p.path: p for p in parameters(open_checkpoint(sys.argv[1]))}
shardings = {path: NamedSharding(mesh, P(None, "tp") if len(p.shape) > 1 else P())
             for path, p in expected.items() if "qkv" not in path and "o_proj" not in path}
target = {path: jax.ShapeDtypeStruct(expected[path].shape, expected[path].dtype,
                                     sharding=shardings.get(path, NamedSharding(mesh, P("tp"))))
          for path in expected}
by_orbax = ocp.StandardCheckpointer().restore(sys.argv[1] + "/parameters", target)
for path, p in expected.items():
    sharding = target[path].sharding
    by_slices = jax.make_array_from_callback(p.shape, sharding, p.load)
    for found in (by_orbax[path], by_slices):
        assert found.sharding == sharding and len(found.addressable_shards) == 2
        assert (np.asarray(found) == p.load()).all(), path
print("equal", len(expected))
"""


def test_orbax_and_slices_restore_a_converted_model_into_the_same_sharded_tree(
    source: Path,
) -> None:
    out = source.with_name("out")
    convert_quietly(source, out, dtype="bfloat16")
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SHARDED, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "equal 15\n", done.stderr


def test_a_shard_of_a_converted_parameter_is_a_view_of_its_file(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    for parameter in parameters(open_checkpoint(out)):
        half = (slice(0, parameter.shape[0] // 2),)
        shard = parameter.load(half)
        assert not shard.flags.owndata
        np.testing.assert_array_equal(shard, load_all(source)[parameter.path][half])


def test_an_existing_directory_is_kept_unless_overwriting_is_asked_for(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    before = load_all(out)
    with pytest.raises(ValueError, match="exists: choose another directory, or pass --overwrite"):
        convert_quietly(source, out, dtype="float16")
    assert_same_tree(load_all(out), before)
    convert_quietly(source, out, dtype="float16", overwrite=True)
    assert {values.dtype.name for values in load_all(out).values()} == {"float16"}


def test_overwriting_never_deletes_what_is_no_conversion(source: Path) -> None:
    precious = source.with_name("precious")
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no converted checkpoint, so it is not overwritten"):
        convert_quietly(source, precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_a_valid_target(source: Path) -> None:
    out = source.with_name("out")
    out.mkdir()
    convert_quietly(source, out)
    assert_same_tree(load_all(out), load_all(source))


def test_a_failure_while_writing_leaves_nothing_behind(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Iterator[Any]:
        raise OSError("No space left on device")

    monkeypatch.setattr("jaxengine.convert.orbax_handler.blocks", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_quietly(source, source.with_name("out"))
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_a_disk_that_is_too_small_is_refused_before_writing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("jaxengine.convert.save.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"the parameters need .* GB, .* smaller --dtype"):
        convert_quietly(source, source.with_name("out"))


# Kills the process at its n-th fsync, or at the rename to a name (or to one with a prefix, "x-").
KILLER = """
import os, signal, sys
source, out, name, at = sys.argv[1:]
import orbax.checkpoint
from jaxengine.convert import convert_checkpoint
original, calls = getattr(os, name), []
def killing(*args, **kwargs):
    calls.append(args)
    last = os.path.basename(str(args[-1]))
    if at in (str(len(calls)), last) or at.endswith("-") and last.startswith(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(os, name, killing)
convert_checkpoint(source, out, "float16", overwrite=True, progress=False)
"""


def killed(source: Path, out: Path, name: str, at: str) -> int:
    command = [sys.executable, "-c", KILLER, str(source), str(out), name, at]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, env=environment, timeout=120).returncode


@pytest.mark.parametrize(
    ("name", "at"), [("fsync", "1"), ("fsync", "9"), ("fsync", "50"), ("rename", "out")]
)
def test_a_killed_conversion_says_that_it_is_incomplete(source: Path, name: str, at: str) -> None:
    out = source.with_name("out")
    assert killed(source, out, name, at) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"never completed: an interrupted conversion left out\."):
        open_checkpoint(out)
    (rest,) = (path for path in source.parent.iterdir() if path.name.startswith("out."))
    with pytest.raises(ValueError, match="incomplete conversion"):
        open_checkpoint(rest)
    convert_quietly(source, out)
    assert_same_tree(load_all(out), load_all(source))
    assert not rest.exists()


@pytest.mark.parametrize(("name", "at"), [("fsync", "5"), ("rename", "out.replaced-")])
def test_a_conversion_killed_before_it_replaces_another_leaves_that_one(
    source: Path, name: str, at: str
) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    assert killed(source, out, name, at) == -signal.SIGKILL
    assert_same_tree(load_all(out), load_all(source))


def test_a_conversion_killed_between_its_two_renames_says_where_both_are(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    assert killed(source, out, "rename", "out") == -signal.SIGKILL
    names = r"interrupted conversion left out\.incomplete-\w+, out\.replaced-\w+"
    with pytest.raises(ValueError, match=names):
        open_checkpoint(out)


def test_the_rest_of_a_conversion_that_still_runs_is_not_removed(source: Path) -> None:
    running = source.with_name("out.incomplete-running")
    running.mkdir()
    with save.holding(running):
        convert_quietly(source, source.with_name("out"))
        assert running.exists()
    convert_quietly(source, source.with_name("out"), overwrite=True)
    assert not running.exists()


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_conversion_killed_at_any_moment_is_complete_or_says_it_is_not(
    source: Path, delay_s: float
) -> None:
    out = source.with_name("out")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxengine.convert", str(source), str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(source.parent.glob("out*")):
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()
    process.wait()
    if out.exists():
        assert_same_tree(load_all(out), load_all(source))
    else:
        with pytest.raises(ValueError, match="never completed"):
            open_checkpoint(out)


def test_a_converted_model_that_lost_a_file_names_the_tensor(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    (out / "parameters" / "layers.1.mlp.down_proj.weight" / "0.0").unlink()
    with pytest.raises(ValueError, match=r"values of 'layers\.1\.mlp\.down_proj\.weight' are miss"):
        open_checkpoint(out)


def test_a_converted_model_that_was_truncated_names_the_tensor(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    with (out / "parameters" / "norm.weight" / "0").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"damaged: 'norm.weight' .* needs 192 bytes, .* has 100"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "../../outside", r"has the tensor name '\.\./\.\./outside'"),
        ("dtype", "O", "has dtype 'O', known: bfloat16"),
        ("shape", [10**12, 10**12], "has more than"),
        ("shape", [2.5], r"axis 0 of tensor .* is 2\.5"),
        ("shape", [1] * 1000, "has a shape of 1000 axes"),
        ("nbytes", 7, "the size of tensor 'embed_tokens.weight' is 7, possible"),
        ("nbytes", None, "the size of tensor 'embed_tokens.weight' is None"),
    ],
)
def test_a_damaged_manifest_names_field_and_value(
    source: Path, field: str, value: Any, message: str
) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tensors"][0]["name"] == "embed_tokens.weight"
    manifest["tensors"][0][field] = value
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{message}"):
        open_checkpoint(out)


def test_a_tensor_that_the_manifest_has_twice_is_refused(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["tensors"].append(manifest["tensors"][0])
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"'embed_tokens\.weight' is there twice"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "<f2"), ("order", "F"), ("shape", [1]), ("compressor", {"id": "zstd"})],
)
def test_an_arrays_metadata_that_says_something_else_is_refused(
    source: Path, field: str, value: Any
) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    file = out / "parameters" / "norm.weight" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=rf"\.zarray: {field} is .*, the manifest says"):
        open_checkpoint(out)


def test_additional_templates_are_converted_too(source: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    out = source.with_name("out")
    convert_quietly(source, out)
    assert open_checkpoint(out).tokenizer_files() == {
        "tokenizer.json": b'{"a": 1}',
        "additional_chat_templates/tool_use.jinja": b"T",
    }


def test_a_conversion_without_manifest_is_incomplete(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"incomplete conversion \(no manifest\.json\)"):
        open_checkpoint(out)


def test_a_conversion_of_a_later_version_is_refused(source: Path) -> None:
    out = source.with_name("out")
    convert_quietly(source, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="has version 99 of the format, this program reads 1"):
        open_checkpoint(out)


@given(
    shape=st.lists(st.integers(1, 7), max_size=4).map(tuple),
    max_bytes=st.integers(1, 200),
)
def test_blocks_joined_give_the_array_in_c_order_and_stay_under_the_limit(
    shape: tuple[int, ...], max_bytes: int
) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    parts = [values[index].reshape(-1) for index in blocks(shape, 4, max_bytes)]
    np.testing.assert_array_equal(np.concatenate(parts), values.reshape(-1))
    assert all(part.nbytes <= max(max_bytes, 4) for part in parts)


def test_the_command_line_converts_and_prints_the_summary(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.with_name("out")
    assert main([str(source), str(out), "--dtype", "bfloat16"]) == 0
    assert "15 tensors" in capsys.readouterr().out
    assert open_checkpoint(out).format == "converted"


def test_the_command_line_prints_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "missing"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("jaxengine-convert: ")


def test_the_demo_model_converts_to_what_it_dequantises_to(tmp_path: Path) -> None:
    model = demo_model()
    convert_quietly(model, tmp_path / "out", dtype="bfloat16")
    expected = load_all(model, "bfloat16")
    assert_same_tree(load_all(tmp_path / "out"), expected)
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
