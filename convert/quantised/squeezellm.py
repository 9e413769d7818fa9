"""SqueezeLLM: indices of 3 or 4 bits into a table of values a row, and sparse outliers.

``w[o, i] = table[o, q[i, o]]``, plus the entries of a sparse matrix in compressed rows (``rows``,
``cols``, ``vals``) where the checkpoint has one.
Source: the published layout of SqueezeLLM's QuantLinearLUT; arXiv:2306.07629.
"""

from __future__ import annotations

import numpy as np
from jaxengine.convert.quantised.packing import unpack
from jaxengine.convert.quantised.tensor import DequantisedTensor, Planes, dequantised
from jaxengine.convert.tensors import read

SUFFIXES = ("qweight", "lookup_table", "rows", "cols", "vals")


def tensor(name: str, planes: Planes, *, bits: int) -> DequantisedTensor:
    """The weight of a linear layer."""
    qweight, table = planes["qweight"], planes["lookup_table"]
    num_in, num_out = qweight.shape[0] * 32 // bits, table.shape[0]

    def dequantise(start: int, stop: int) -> np.ndarray:
        q = unpack(qweight.rows(0, qweight.shape[0])[:, start:stop], bits, axis=0).T
        values = table.rows(start, stop).astype(np.float32)
        weight = np.take_along_axis(values, q.astype(np.int64), axis=1)
        if "vals" in planes:
            _add_outliers(weight, planes, start, stop)
        return weight

    return dequantised(name, (num_out, num_in), planes, table.dtype, dequantise)


def _add_outliers(weight: np.ndarray, planes: Planes, start: int, stop: int) -> None:
    ends = read(planes["rows"])
    columns, values = read(planes["cols"]), read(planes["vals"]).astype(np.float32)
    for row in range(start, stop):
        own = slice(int(ends[row]), int(ends[row + 1]))
        np.add.at(weight[row - start], columns[own], values[own])
