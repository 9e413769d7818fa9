"""Small integers out of the words that hold them."""

from __future__ import annotations

import numpy as np


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unpack unsigned integers that lie one after the other, the lowest bits first.

    Where ``bits`` does not divide 32 (3), a value may begin in one word and end in the next.

    Args:
        words: int32 or uint32, or uint8 where ``bits`` divides 8.
        bits: Of a value: 2, 3, 4 or 8.
        axis: Along which values were packed; it grows by the number of values in a word.

    Returns:
        uint8 values.
    """
    words = np.moveaxis(words, axis, -1)
    width = words.dtype.itemsize * 8
    unsigned = words.astype(f"uint{width}", copy=False)
    if width % bits == 0:
        shifts = np.arange(0, width, bits, dtype=unsigned.dtype)
        values = (unsigned[..., None] >> shifts) & np.array((1 << bits) - 1, unsigned.dtype)
        unpacked = values.astype(np.uint8).reshape(*words.shape[:-1], -1)
    else:
        unpacked = _unpack_stream(np.ascontiguousarray(unsigned), bits)
    return np.moveaxis(unpacked, -1, axis)


def _unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    values = stream.reshape(*words.shape[:-1], -1, bits)
    return (values << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


# e2m1: one sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, version 1.0).
FP4_VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)


def e8m0(exponents: np.ndarray) -> np.ndarray:
    """Powers of two from their biased exponents (uint8), as float32."""
    return np.exp2(exponents.astype(np.float32) - 127)
