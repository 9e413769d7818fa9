"""Reads the header of a safetensors file and checks it against the file, before any tensor.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes, one behind the
other without a gap. The format has no checksum: a flipped bit in a weight cannot be seen.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxengine.convert.errors import CheckpointError, check_unique, integer, shape_of, shown
from jaxengine.convert.json_file import parse
from jaxengine.convert.tensors import MappedTensor, file_bytes_of

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
        CheckpointError: If the file is truncated or its header does not describe it.
    """
    file_bytes = file_bytes_of(path)
    header, data_start = _read_header(path, file_bytes)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    _check_layout(path, tensors, data_start, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def _read_header(path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header claims {length} bytes, "
                f"the file has {file_bytes}. Fetch it again."
            )
        content = file.read(length)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        check_unique((name for name, _ in items), path, "the header's key")
        return dict(items)

    header = parse(content, path, pairs)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is {shown(header)}, no JSON object")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> MappedTensor:
    try:
        dtype_name, sizes = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has a damaged header entry: {shown(entry)}"
        ) from None
    if not isinstance(dtype_name, str) or dtype_name not in DTYPE_NAMES:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has dtype {shown(dtype_name)}, known: "
            f"{', '.join(DTYPE_NAMES)}"
        )
    shape = shape_of(sizes, path, name)
    dtype = np.dtype(DTYPE_NAMES[dtype_name])
    size = math.prod(shape) * dtype.itemsize
    begin, end = (
        integer(offset, path, f"an offset of tensor {shown(name)}", 0, 1 << 62)
        for offset in (begin, end)
    )
    if end - begin != size:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {shape} and dtype {dtype} needs {size} bytes, "
            f"its offsets [{begin}, {end}) hold {end - begin}"
        )
    return MappedTensor(name, shape, dtype, path, data_start + begin)


def _check_layout(
    path: Path, tensors: list[MappedTensor], data_start: int, file_bytes: int
) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    expected = data_start
    for tensor in sorted(tensors, key=lambda each: (each.offset, each.nbytes)):
        end = tensor.offset + tensor.nbytes
        if end > file_bytes:
            raise CheckpointError(
                f"{path} is truncated: tensor {shown(tensor.name)} ends at byte {end}, "
                f"the file has {file_bytes}. Fetch it again."
            )
        if tensor.offset != expected:
            what = "overlaps another one" if tensor.offset < expected else "leaves a gap"
            raise CheckpointError(
                f"{path}: tensor {shown(tensor.name)} begins at byte {tensor.offset}, expected "
                f"{expected}: it {what}, so the header is damaged. Fetch it again."
            )
        expected = end
    if expected != file_bytes:
        raise CheckpointError(
            f"{path}: its tensors end at byte {expected}, the file at {file_bytes}: the header is "
            "damaged. Fetch it again."
        )
