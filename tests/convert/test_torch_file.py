import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxengine.convert import open_checkpoint, parameters
from jaxengine.convert.errors import CheckpointError
from jaxengine.convert.tensors import read
from jaxengine.convert.torch_file import open_torch_file

from tests.convert.tiny import assert_same_tree, expected_parameters, make_model


def save(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path


def test_a_model_saved_by_torch_equals_its_state_dict(tmp_path: Path) -> None:
    model = make_model("Llama")
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "pytorch_bin"
    found = {p.path: p.load() for p in parameters(checkpoint)}
    assert_same_tree(found, expected_parameters(model))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
def test_values_come_back_in_the_dtype_they_were_saved_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    found = read(open_torch_file(save(tmp_path / "f.bin", {"x": tensor}))["x"])
    assert found.dtype.name == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


def test_views_into_one_storage_are_read_with_their_offset_and_strides(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"transposed": base.T, "part": base[1:3, 2:5], "row": base[2]}
    found = open_torch_file(save(tmp_path / "f.bin", views))
    for name, view in views.items():
        np.testing.assert_array_equal(read(found[name]), view.numpy())
        np.testing.assert_array_equal(found[name].rows(1, 2), view[1:2].numpy())


def test_parameters_and_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    tensors = {
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
    }
    found = open_torch_file(save(tmp_path / "f.bin", tensors))
    assert [read(found[name]).shape for name in tensors] == [(3,), (), (0, 3)]


class Malicious:
    """Runs a command when it is unpickled by pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_code_is_refused_with_its_name_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = save(tmp_path / "f.bin", {"x": torch.ones(2), "y": Malicious(marker)})
    with pytest.raises(ValueError, match=r"names (posix|nt)\.system, which is no part of a tensor"):
        open_torch_file(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "target", ["builtins.eval", "torch.load", "torch._utils._rebuild_sparse_tensor", "torch.nn.X"]
)
def test_any_name_but_those_of_tensors_is_refused(tmp_path: Path, target: str) -> None:
    module, _, name = target.rpartition(".")
    path = tmp_path / "f.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", f"c{module}\n{name}\n.")
    with pytest.raises(ValueError, match=f"names {target}"):
        open_torch_file(path)


def test_state_set_on_a_tensor_by_the_pickle_is_refused(tmp_path: Path) -> None:
    # After the tensor is built, a BUILD opcode tries to set attributes on it.
    path = save(tmp_path / "f.bin", {"x": torch.ones(2)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("f/data.pkl")
    # "s." or "u." stores the tensor and stops; put a state and BUILD before it.
    state = pickle.dumps({"offset": 4096}, protocol=2)[2:-1]
    changed = pickled[:-2] + state + b"b" + pickled[-2:]
    with zipfile.ZipFile(tmp_path / "g.bin", "w") as archive:
        archive.writestr("f/data.pkl", changed)
        archive.writestr("f/data/0", bytes(8))
    with pytest.raises(ValueError, match=r"g\.bin: .*no attribute"):
        open_torch_file(tmp_path / "g.bin")


def rewritten(path: Path, **changes: bytes | None) -> Path:
    """The same zip with entries replaced, or left out where None."""
    out = path.with_name("rewritten.bin")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = changes.get(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out


def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.ones(4)})
    with pytest.raises(ValueError, match=r"of tensor 'x' is said to hold 16 bytes, it holds 12"):
        open_torch_file(rewritten(path, **{"data/0": bytes(12)}))


def test_a_missing_storage_names_the_tensor(tmp_path: Path) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.ones(4)})
    with pytest.raises(ValueError, match="values of tensor 'x' are missing"):
        open_torch_file(rewritten(path, **{"data/0": None}))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.ones(400)})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="truncated"):
        open_torch_file(path)


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.ones(4)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("f/data.pkl")
    with pytest.raises(ValueError, match=r"rewritten\.bin"):
        open_torch_file(rewritten(path, **{"data.pkl": pickled[:20]}))


def test_a_value_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'step' is a int, expected a tensor"):
        open_torch_file(save(tmp_path / "f.bin", {"x": torch.ones(2), "step": 7}))


def local_header(content: bytes, entry: str) -> int:
    """Where the header before an entry starts."""
    return content.index(entry.encode()) - 30


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "the signature of entry 'f/data/0'"),
        (6, "the flags of entry 'f/data/0'"),
        (8, "the method of entry 'f/data/0'"),
        (26, "the name of entry 'f/data/0'"),
        (28, "entry 'f/data/0' has 16 bytes from byte .*, the next one starts at"),
        (30, "the name of entry 'f/data/0'"),
    ],
)
def test_a_flipped_bit_in_the_header_before_an_entry_is_seen(
    tmp_path: Path, place: int, message: str
) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.arange(4.0)})
    content = bytearray(path.read_bytes())
    content[local_header(bytes(content), "f/data/0") + place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"f\.bin: {message}"):
        open_torch_file(path)


def test_a_flipped_bit_in_a_weight_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.arange(1000.0)})
    content = path.read_bytes()
    at = content.index(torch.arange(1000.0).numpy().tobytes())
    path.write_bytes(content[: at + 9] + bytes([content[at + 9] ^ 4]) + content[at + 10 :])
    with pytest.raises(CheckpointError, match=r"checksum of entry 'f/data/0' is 0x\w{8}, the zip"):
        open_torch_file(path)


def test_every_cut_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.ones(40)})
    whole = path.read_bytes()
    for size in range(0, len(whole), 61):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"f\.bin"):
            open_torch_file(path)


def test_a_tensor_that_repeats_its_storage_takes_no_memory(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "f.bin", {"x": torch.ones(1).expand(2**30, 2)})
    with pytest.raises(CheckpointError, match="needs 8589934592 bytes, its storage holds 4"):
        open_torch_file(path)


@pytest.mark.parametrize(
    ("size", "stride"), [((4, 2), (0, 1)), ((4, 2), (1, 1)), ((2, 2, 2), (2, 1, 1))]
)
def test_a_tensor_whose_elements_share_their_place_is_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    tensor = torch.arange(8.0).as_strided(size, stride)
    with pytest.raises(CheckpointError, match=r"'x' of shape .* elements share their place"):
        open_torch_file(save(tmp_path / "f.bin", {"x": tensor}))
