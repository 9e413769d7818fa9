"""AWQ in the layout of its "gemm" kernels: 4 bits, groups along the input, zero points.

``w[o, i] = (q[i, o] - z[i // g, o]) * s[i // g, o]``. Eight columns share a word, in an order
that suits the kernels: nibble n holds column ``ORDER[n]``.
Source: the published layout of AutoAWQ's WQLinear_GEMM; arXiv:2306.00978.
"""

from __future__ import annotations

import numpy as np
from jaxengine.convert.quantised.packing import unpack
from jaxengine.convert.quantised.tensor import DequantisedTensor, Planes, dequantised, spread

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE_OF_COLUMN = np.argsort(ORDER)
SUFFIXES = ("qweight", "qzeros", "scales")


def tensor(name: str, planes: Planes) -> DequantisedTensor:
    """The weight of a linear layer."""
    qweight, qzeros, scales = (planes[suffix] for suffix in SUFFIXES)
    num_in, num_out = qweight.shape[0], scales.shape[1]

    def dequantise(start: int, stop: int) -> np.ndarray:
        first, last = start // 8, -(-stop // 8)
        inside = slice(start - 8 * first, stop - 8 * first)
        q = _columns(qweight.rows(0, num_in)[:, first:last])[:, inside].astype(np.float32)
        z = _columns(qzeros.rows(0, qzeros.shape[0])[:, first:last])[:, inside].astype(np.float32)
        s = scales.rows(0, scales.shape[0])[:, start:stop].astype(np.float32)
        return ((q - spread(z, num_in, 0)) * spread(s, num_in, 0)).T

    return dequantised(name, (num_out, num_in), planes, scales.dtype, dequantise)


def _columns(words: np.ndarray) -> np.ndarray:
    nibbles = unpack(words, 4, axis=1).reshape(words.shape[0], -1, 8)
    return nibbles[:, :, _PLACE_OF_COLUMN].reshape(words.shape[0], -1)
