"""A quantised weight that is read as if it were a plain one: dequantised row by row, on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxengine.convert.tensors import StoredTensor, read

Planes = dict[str, StoredTensor]


@dataclass(frozen=True)
class DequantisedTensor:
    """A weight [out, in] whose values are computed from the planes that a format stores.

    Attributes:
        name: Name of the weight, as if it were a plain one.
        shape: [out, in].
        dtype: Of the values: what the format's scales are stored in.
        nbytes: Bytes of its planes in the files.
        dequantise: Gives rows ``start`` to ``stop`` of the weight, in float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    dequantise: Callable[[int, int], np.ndarray]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, dequantised in float32 and rounded once."""
        return self.dequantise(start, stop).astype(self.dtype)


def dequantised(
    name: str,
    shape: tuple[int, ...],
    planes: Planes,
    dtype: np.dtype,
    dequantise: Callable[[int, int], np.ndarray],
) -> DequantisedTensor:
    """Put such a tensor together."""
    num_bytes = sum(plane.nbytes for plane in planes.values())
    return DequantisedTensor(name, shape, dtype, num_bytes, dequantise)


def float32(tensor: StoredTensor) -> np.ndarray:
    """A whole plane as float32."""
    return read(tensor).astype(np.float32)


def spread(scales: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Repeat scales of groups so that there is one for each of ``length`` elements of an axis."""
    count = scales.shape[axis]
    if count == length:
        return scales
    size = -(-length // count)
    repeated = np.repeat(scales, size, axis=axis)
    return np.take(repeated, range(length), axis=axis) if count * size != length else repeated
