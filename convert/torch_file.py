"""Reads a ``torch.save`` file (zip format) without torch and without running what it says.

A pickle may name any function and call it. The unpickler here knows only how torch rebuilds
tensors, the storage types, and OrderedDict; every other name is refused. A tensor is never built
while unpickling: what comes out are records that say where its values lie in the zip file.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxengine.convert.tensors import MappedTensor

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


# Tuples, not objects: pickle can set attributes on an object after it is built, never on these.
class _Dtype(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: _Dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: _Dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any
) -> _Tensor:
    return _Tensor(storage, storage.dtype, int(offset), tuple(shape), tuple(strides))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    return _Tensor(storage, dtype, int(offset), tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *unused: Any) -> Any:
    return tensor


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", "UntypedStorage"): _Dtype("uint8"),
    **{("torch", name): _Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): _Dtype(name) for name in DTYPES},
}


class _TensorUnpickler(pickle.Unpickler):
    """Builds records of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(
                f"its pickle names {module}.{name}, which is no part of a tensor. A pickle can "
                "run any code, so this file is refused: use a safetensors checkpoint"
            )
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        if not isinstance(dtype, _Dtype):
            raise ValueError(f"its pickle has a storage of unknown type {dtype!r}")
        return _Storage(dtype, str(key))


def open_torch_file(path: Path) -> dict[str, MappedTensor]:
    """Every tensor of the file, by name, mapped where it lies.

    Raises:
        ValueError: If the file is no zip of torch's, is truncated, holds a pickle that names
            anything but tensors, or a tensor that leaves its storage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            state, locate = _read_state(archive, path)
            return {str(name): _mapped(path, name, value, locate) for name, value in state.items()}
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path} is truncated, or in torch's format from before 1.6: fetch it again, or use "
            "a safetensors checkpoint"
        ) from None


def _read_state(
    archive: zipfile.ZipFile, path: Path
) -> tuple[dict[Any, Any], Callable[[str], zipfile.ZipInfo]]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"{path} is a zip without torch's data.pkl")
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(f"{path} was written on a big-endian machine: not supported")
    try:
        state = _TensorUnpickler(io.BytesIO(archive.read(names[0]))).load()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: its pickle is damaged ({error})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")

    def locate(key: str) -> zipfile.ZipInfo:
        return archive.getinfo(f"{root}data/{key}")

    return state, locate


def _mapped(
    path: Path, name: Any, value: Any, locate: Callable[[str], zipfile.ZipInfo]
) -> MappedTensor:
    if not isinstance(value, _Tensor):
        raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    try:
        entry = locate(value.storage.key)
    except KeyError:
        raise ValueError(f"{path}: the values of tensor {name!r} are missing") from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: tensor {name!r} is compressed, which torch never does")
    dtype = np.dtype(DTYPES[value.dtype.name])
    _check_inside(path, name, value, dtype.itemsize, entry.file_size)
    offset = _data_start(path, entry) + value.offset * dtype.itemsize
    strides = None if value.strides == _c_strides(value.shape) else value.strides
    return MappedTensor(str(name), value.shape, dtype, path, offset, strides)


def _check_inside(path: Path, name: Any, value: _Tensor, itemsize: int, num_bytes: int) -> None:
    sizes = (*value.shape, *value.strides, value.offset)
    whole = len(value.shape) == len(value.strides) and all(type(n) is int for n in sizes)
    if not whole or min(sizes) < 0:
        raise ValueError(f"{path}: tensor {name!r} has a damaged shape {value.shape}")
    last = sum((size - 1) * step for size, step in zip(value.shape, value.strides, strict=True))
    needed = (value.offset + last + 1) * itemsize if all(value.shape) else 0
    if needed > num_bytes:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {value.shape} needs {needed} bytes, "
            f"its storage holds {num_bytes}"
        )


def _data_start(path: Path, entry: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    # 30 bytes of local file header, then its name and its extra field (torch pads with it).
    return int(entry.header_offset + 30 + name_bytes + extra_bytes)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()
