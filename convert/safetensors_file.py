"""Reads the header of a safetensors file and checks it against the file, before any tensor.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxengine.convert.tensors import MappedTensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPE_NAMES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_safetensors(path: Path) -> dict[str, MappedTensor]:
    """Every tensor of the file, by name.

    Raises:
        ValueError: If the file is truncated or its header does not describe it.
    """
    header, data_start = _read_header(path)
    file_bytes = path.stat().st_size
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: _tensor(path, name, entries[name], data_start, file_bytes) for name in entries}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header claims {length} bytes, "
                f"the file has {file_bytes}. Fetch it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: the safetensors header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is no JSON object")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> MappedTensor:
    try:
        dtype_name, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: tensor {name!r} has a damaged header entry: {entry}") from None
    if dtype_name not in DTYPE_NAMES:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {dtype_name}, known: {', '.join(DTYPE_NAMES)}"
        )
    dtype = np.dtype(DTYPE_NAMES[dtype_name])
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs {size} bytes, "
            f"its offsets [{begin}, {end}) hold {end - begin}"
        )
    if data_start + end > file_bytes:
        raise ValueError(
            f"{path} is truncated: tensor {name!r} ends at byte {data_start + end}, "
            f"the file has {file_bytes}. Fetch it again."
        )
    return MappedTensor(name, shape, dtype, path, data_start + begin)
