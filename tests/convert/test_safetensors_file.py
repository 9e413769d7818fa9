import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from jaxengine.convert.safetensors_file import open_safetensors
from jaxengine.convert.tensors import read
from safetensors.numpy import save_file


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8]
)
def test_values_come_back_in_the_dtype_they_were_saved_in(tmp_path: Path, dtype: type) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    save_file({"other": np.ones(5, np.float32), "x": values}, tmp_path / "f")
    found = read(open_safetensors(tmp_path / "f")["x"])
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 3), np.float32)}
    save_file(tensors, tmp_path / "f")
    found = open_safetensors(tmp_path / "f")
    assert read(found["scalar"]) == 7
    assert read(found["empty"]).shape == (0, 3)


@pytest.mark.parametrize("kept_bytes", [0, 5, 8, 40])
def test_a_file_cut_inside_its_header_is_refused(tmp_path: Path, kept_bytes: int) -> None:
    save_file({"x": np.ones((8, 8), np.float32)}, tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:kept_bytes])
    with pytest.raises(ValueError, match="f is truncated or no safetensors file"):
        open_safetensors(tmp_path / "f")


def test_a_file_cut_inside_its_data_names_the_first_tensor_that_is_lost(tmp_path: Path) -> None:
    save_file({"a": np.ones(8, np.float32), "b": np.ones(8, np.float32)}, tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"truncated: tensor 'b' ends at byte \d+, the file has"):
        open_safetensors(tmp_path / "f")


def test_offsets_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}
    path = write_raw(tmp_path / "f", {"x": entry}, bytes(16))
    with pytest.raises(ValueError, match=r"'x' of shape \(4,\) .* needs 16 bytes"):
        open_safetensors(path)


def test_negative_offsets_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}
    with pytest.raises(ValueError, match="tensor 'x'"):
        open_safetensors(write_raw(tmp_path / "f", {"x": entry}))


def test_a_damaged_header_entry_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor 'x' has a damaged header entry"):
        open_safetensors(write_raw(tmp_path / "f", {"x": {"dtype": "F32"}}))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}
    with pytest.raises(ValueError, match="'x' has dtype 'F4'"):
        open_safetensors(write_raw(tmp_path / "f", {"x": entry}, bytes(2)))


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        open_safetensors(tmp_path / "f")
