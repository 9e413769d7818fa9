"""A tensor in a file: its name, shape and dtype are known, its bytes are read on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from jaxengine.convert.errors import CheckpointError

Index = tuple[slice, ...]

# What a caller may ask for. ml_dtypes registers bfloat16 and the 8-bit floats with numpy.
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class StoredTensor(Protocol):
    """What every file format offers for one of its tensors."""

    @property
    def name(self) -> str:
        """Name in Hugging Face's vocabulary, or our path in a converted directory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that ``rows`` cuts from."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array ``rows`` returns: of a quantised tensor, the dequantised one."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the first axis: a read-only view of the file if it can be.

        The mapping ends with the last reference to the array, so a caller that drops the array
        also gives back the memory.
        """


@dataclass(frozen=True)
class MappedTensor:
    """Plain values in a file, mapped and never copied.

    Attributes:
        offset: Where the tensor's first element lies, in bytes from the start of the file.
        strides: Elements from one index to the next of each axis; None for C order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the first axis, as a view of the mapped file."""
        if not self.shape:
            return self._map(self.offset, 1).reshape(())
        shape = (stop - start, *self.shape[1:])
        if math.prod(shape) == 0:
            return np.empty(shape, self.dtype)
        if self.strides is None:
            row = math.prod(self.shape[1:])
            offset = self.offset + start * row * self.dtype.itemsize
            return self._map(offset, math.prod(shape)).reshape(shape)
        span = 1 + sum((size - 1) * step for size, step in zip(shape, self.strides, strict=True))
        first = self._map(self.offset + start * self.strides[0] * self.dtype.itemsize, span)
        strides = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(first, shape, strides, writeable=False)

    def _map(self, offset: int, count: int) -> np.ndarray:
        length = count * self.dtype.itemsize
        # Plain ndarray: np.memmap as a subclass would follow the array through every operation.
        mapped = np.memmap(self.path, np.uint8, mode="r", offset=offset, shape=(length,))
        return np.asarray(mapped).view(self.dtype)


@dataclass(frozen=True)
class ZeroTensor:
    """A tensor that a format may leave out, where its absence means zeros."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype = DTYPES["float32"]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``."""
        return np.zeros((stop - start, *self.shape[1:]), self.dtype)


def file_bytes_of(path: Path) -> int:
    """Length of a file of weights.

    Raises:
        CheckpointError: If it is missing, or no file.
    """
    try:
        if path.is_file():
            return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    raise CheckpointError(f"{path} is missing" if not path.exists() else f"{path} is no file")


def read(tensor: StoredTensor) -> np.ndarray:
    """The whole tensor, mapped where the format allows it."""
    return tensor.rows(0, tensor.shape[0] if tensor.shape else 1)


def read_box(tensor: StoredTensor, box: tuple[int, ...], index: Index) -> np.ndarray:
    """Cut ``index`` out of the tensor seen in the shape ``box``, touching few other rows.

    Args:
        tensor: Where to read.
        box: A shape of as many elements as the tensor has.
        index: One slice an axis of ``box``, with start and stop set and step 1.

    Returns:
        The part, of ``stop - start`` elements along each axis.
    """
    axis = next((i for i, size in enumerate(box) if size != 1), 0)
    if not tensor.shape or tensor.shape[0] % box[axis]:
        return read(tensor).reshape(box)[index]
    rows_each = tensor.shape[0] // box[axis]
    start, stop = index[axis].start, index[axis].stop
    part = tensor.rows(start * rows_each, stop * rows_each)
    inner = (*index[:axis], slice(0, stop - start), *index[axis + 1 :])
    return part.reshape(*box[:axis], stop - start, *box[axis + 1 :])[inner]


def full_index(shape: tuple[int, ...], index: Index | None = None) -> Index:
    """The same index with every axis named and every bound set.

    Raises:
        ValueError: If the index has too many axes, a step, or leaves the shape.
    """
    index = index or ()
    if len(index) > len(shape):
        raise ValueError(f"index {index} has {len(index)} axes, the tensor has shape {shape}")
    whole = (*index, *(slice(None) for _ in shape[len(index) :]))
    bounds = []
    for part, size in zip(whole, shape, strict=True):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(f"{part} does not cut a run out of an axis of {size} (shape {shape})")
        bounds.append(slice(start, stop))
    return tuple(bounds)
