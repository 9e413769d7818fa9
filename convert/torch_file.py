"""Opens a ``torch.save`` file (zip format) without torch: its tensors, mapped where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxengine.convert import torch_pickle
from jaxengine.convert.errors import (
    MAX_ELEMENTS,
    CheckpointError,
    check_unique,
    integer,
    shape_of,
    shown,
)
from jaxengine.convert.tensors import MappedTensor
from jaxengine.convert.torch_pickle import TensorRecord
from jaxengine.convert.torch_zip import Entry, content_of, read_entries

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in torch_pickle.DTYPES}
MAX_PICKLE_BYTES = 64 * 2**20  # of the largest models: some MB


def open_torch_file(path: Path) -> dict[str, MappedTensor]:
    """Every tensor of the file, by name, mapped where it lies.

    Raises:
        CheckpointError: If the file is no zip of torch's, is damaged, holds a pickle that names
            anything but tensors, or a tensor that leaves its storage.
    """
    entries = read_entries(path)
    root = _root(path, entries)
    byteorder = entries.get(f"{root}byteorder")
    if byteorder is not None and content_of(path, byteorder) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine: not supported")
    state = _state(path, entries[f"{root}data.pkl"])
    storages = {name.removeprefix(f"{root}data/"): entry for name, entry in entries.items()}
    tensors = [_mapped(path, str(name), value, storages) for name, value in state.items()]
    check_unique((tensor.name for tensor in tensors), path, "tensor")
    return {tensor.name: tensor for tensor in tensors}


def _root(path: Path, entries: Mapping[str, Entry]) -> str:
    """The folder of the zip in which all lies: torch names it after the file."""
    names = [name for name in entries if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError(f"{path} is a zip without torch's data.pkl")
    return names[0].removesuffix("data.pkl")


def _state(path: Path, entry: Entry) -> dict[Any, Any]:
    integer(entry.size, path, "the size of data.pkl", 1, MAX_PICKLE_BYTES)
    try:
        state = torch_pickle.load(content_of(path, entry))
    except torch_pickle.PickleError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def _mapped(path: Path, name: str, value: Any, storages: Mapping[str, Entry]) -> MappedTensor:
    if not isinstance(value, TensorRecord):
        raise CheckpointError(
            f"{path}: {shown(name)} is a {type(value).__name__}, expected a tensor"
        )
    entry = storages.get(value.storage.key)
    if entry is None:
        raise CheckpointError(f"{path}: the values of tensor {shown(name)} are missing")
    _check_storage(path, name, value, entry)
    dtype = DTYPES[value.dtype.name]
    shape, strides, offset = _layout(path, name, value, dtype.itemsize, entry.size)
    start = entry.start + offset * dtype.itemsize
    return MappedTensor(
        name, shape, dtype, path, start, None if strides == _c_strides(shape) else strides
    )


def _check_storage(path: Path, name: str, value: TensorRecord, entry: Entry) -> None:
    itemsize = DTYPES[value.storage.dtype.name].itemsize
    declared = value.storage.num_elements
    integer(declared, path, f"the storage of tensor {shown(name)}", 0, 1 << 62)
    if declared * itemsize != entry.size:
        raise CheckpointError(
            f"{path}: the storage of tensor {shown(name)} is said to hold {declared * itemsize} "
            f"bytes, it holds {entry.size}: the file is damaged, fetch it again"
        )


def _layout(
    path: Path, name: str, value: TensorRecord, itemsize: int, num_bytes: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of a tensor, in elements, that stay inside its storage."""
    shape = shape_of(value.shape, path, name)
    strides = value.strides if isinstance(value.strides, tuple) else ()
    for step in strides[: len(shape)]:
        integer(step, path, f"a stride of tensor {shown(name)}", 0, MAX_ELEMENTS)
    offset = integer(value.offset, path, f"the offset of tensor {shown(name)}", 0, num_bytes)
    if len(strides) != len(shape):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has a damaged shape {shape}, with strides "
            f"{shown(value.strides)}"
        )
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    needed = (offset + max(last + 1, math.prod(shape))) * itemsize if all(shape) else 0
    if needed > num_bytes:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {shape} needs {needed} bytes, "
            f"its storage holds {num_bytes}"
        )
    if all(shape) and _overlaps(shape, strides):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {shape} has strides {strides}, with which "
            "elements share their place: the file is damaged, fetch it again"
        )
    return shape, strides, offset


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements may lie in one place: each axis must step over the ones inside it."""
    inside = 0
    for step, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if step <= inside:
                return True
            inside += (size - 1) * step
    return False


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()
