import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from jaxengine.convert.errors import CheckpointError
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


def entry(begin: int, end: int, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "num_bytes", "message"),
    [
        (
            {"a": entry(0, 8), "b": entry(4, 12)},
            12,
            "'b' begins at byte .* it overlaps another",
        ),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "'b' begins at byte .* it overlaps another"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "'b' begins at byte .* it leaves a gap"),
        ({"a": entry(4, 12)}, 12, "'a' begins at byte .* it leaves a gap"),
        ({"a": entry(0, 8)}, 12, "its tensors end at byte .*, the file at"),
        ({"a": entry(0, 2**70)}, 8, "an offset of tensor 'a' is 1180591620717411303424, possible"),
        ({"a": entry(0, 8, [2.0])}, 8, r"axis 0 of tensor 'a' is 2\.0, possible is an integer"),
        ({"a": entry(0, 8, [True, 2])}, 8, "axis 0 of tensor 'a' is True, possible"),
        ({"a": entry(0, 8, [-1, -2])}, 8, "axis 0 of tensor 'a' is -1, possible"),
        ({"a": entry(0, 8, [1] * 2_000_000)}, 8, "'a' has a shape of 2000000 axes, possible"),
        ({"a": entry(0, 0, [0, 2**47, 2**47])}, 0, "'a' of shape .* has more than"),
        ({"a": entry(0, 8, "22")}, 8, "'a' has a shape of '22', possible"),
        ({"a": {**entry(0, 8), "dtype": ["F32"]}}, 8, r"'a' has dtype \['F32'\], known"),
        ({"a": {**entry(0, 8), "data_offsets": [0]}}, 8, "'a' has a damaged header entry"),
        ({"a": [1, 2]}, 8, r"'a' has a damaged header entry: \[1, 2\]"),
    ],
)
def test_a_header_that_does_not_describe_the_file_names_tensor_and_value(
    tmp_path: Path, entries: dict[str, object], num_bytes: int, message: str
) -> None:
    path = write_raw(tmp_path / "model.safetensors", entries, bytes(num_bytes))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": {"dtype": "F32"}, "a": 1}', "the header's key 'a' is there twice"),
        (b"[" * 100_000, "nests JSON values deeper than 64 levels"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", r"header is \[\], no JSON object"),
    ],
)
def test_a_header_that_is_no_plain_json_object_is_refused(
    tmp_path: Path, header: bytes, message: str
) -> None:
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(tmp_path / "f")
