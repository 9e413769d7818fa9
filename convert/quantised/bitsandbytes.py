"""bitsandbytes' 4 bits: indices into a table of 16 values, scaled by the largest of a block.

``w[k] = table[q[k]] * absmax[k // blocksize]`` over the weight in C order, two values a byte, the
first in the upper half. With double quantisation the maxima themselves are stored in 8 bits:
``absmax[b] = nested_table[a[b]] * nested_absmax[b // nested_blocksize] + offset``.
Source: the published layout of bitsandbytes' QuantState; arXiv:2305.14314.
"""

from __future__ import annotations

import json
import math

import numpy as np
from jaxengine.convert.quantised.tensor import DequantisedTensor, Planes, dequantised, float32
from jaxengine.convert.tensors import read

STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
SUFFIXES = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
    *("weight.nested_quant_map", *(f"weight.{state}" for state in STATES)),
)


def tensor(name: str, planes: Planes, dtype: np.dtype) -> DequantisedTensor:
    """The weight of a linear layer.

    Raises:
        ValueError: If the state's JSON is damaged or does not fit the planes.
    """
    stored = next(planes[f"weight.{state}"] for state in STATES if f"weight.{state}" in planes)
    try:
        state = json.loads(read(stored).tobytes())
        shape, block = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: the quantisation state is damaged ({error})") from None
    weight, table = planes["weight"], float32(planes["weight.quant_map"])
    count = math.prod(shape)
    if len(shape) != 2 or block < 1 or weight.nbytes * 2 != count or table.shape != (16,):
        raise ValueError(
            f"{name}: a state of shape {shape} and blocks of {block} does not fit "
            f"{weight.nbytes} bytes and a table of {table.shape[0]} values"
        )
    absmax = _absmax(planes, state)

    def dequantise(start: int, stop: int) -> np.ndarray:
        first, last = start * shape[1], stop * shape[1]
        flat = read(weight).reshape(-1)
        packed = flat[first // 2 : -(-last // 2)]
        q = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        q = q[first % 2 : first % 2 + last - first]
        scales = absmax[np.arange(first, last) // block]
        return (table[q] * scales).reshape(stop - start, shape[1])

    return dequantised(name, shape, planes, dtype, dequantise)


def _absmax(planes: Planes, state: dict) -> np.ndarray:
    if "weight.nested_absmax" not in planes:
        return float32(planes["weight.absmax"])
    outer = float32(planes["weight.nested_absmax"])
    table = float32(planes["weight.nested_quant_map"])
    codes = read(planes["weight.absmax"]).astype(np.int64)
    block = int(state["nested_blocksize"])
    inner = table[codes] * outer[np.arange(codes.shape[0]) // block]
    return inner + np.float32(state["nested_offset"])
