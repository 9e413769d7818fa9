"""compressed-tensors' packed weights: integers of 4 or 8 bits, and FP4 with two levels of scales.

Integers: ``w[o, i] = (q[o, i] - z) * s`` for groups along the input, q packed in words along it
and stored with half of its range added. FP4 (NVFP4): ``w = e2m1 * s / global``; MXFP4: ``w = e2m1
* 2^s``.
Source: the published layout of compressed-tensors' compressors.
"""

from __future__ import annotations

import numpy as np
from jaxengine.convert.quantised.packing import FP4_VALUES, e8m0, unpack
from jaxengine.convert.quantised.tensor import (
    DequantisedTensor,
    Planes,
    dequantised,
    float32,
    spread,
)
from jaxengine.convert.tensors import read

SUFFIXES = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("weight_global_scale", "input_global_scale", "input_scale"),
)


def integers(name: str, planes: Planes, *, bits: int) -> DequantisedTensor:
    """The weight of a linear layer, packed integers."""
    packed, scale = planes["weight_packed"], planes["weight_scale"]
    num_out, num_in = (int(n) for n in read(planes["weight_shape"]))
    group = read(planes["weight_g_idx"]) if "weight_g_idx" in planes else None
    if group is not None and group.min() < 0:
        group = None  # -1 everywhere: not permuted

    def by_input(values: np.ndarray) -> np.ndarray:
        return spread(values, num_in, 1) if group is None else values[:, group]

    def dequantise(start: int, stop: int) -> np.ndarray:
        q = unpack(packed.rows(start, stop), bits, axis=1)[:, :num_in].astype(np.float32)
        zero: np.ndarray = np.asarray(1 << (bits - 1), np.float32)
        if "weight_zero_point" in planes:
            zeros = planes["weight_zero_point"]
            zero = by_input(unpack(read(zeros), bits, axis=0)[start:stop].astype(np.float32))
        return (q - zero) * by_input(scale.rows(start, stop).astype(np.float32))

    return dequantised(name, (num_out, num_in), planes, scale.dtype, dequantise)


def fp4(name: str, planes: Planes, dtype: np.dtype) -> DequantisedTensor:
    """The weight of a linear layer, two FP4 values a byte, the first in the lower half."""
    packed, scale = planes["weight_packed"], planes["weight_scale"]
    num_out, num_in = packed.shape[0], packed.shape[1] * 2
    is_mx = scale.dtype == np.uint8
    whole = 1.0 if is_mx else float(float32(planes["weight_global_scale"]).reshape(-1)[0])

    def dequantise(start: int, stop: int) -> np.ndarray:
        values = FP4_VALUES[unpack(packed.rows(start, stop), 4, axis=1)]
        scales = scale.rows(start, stop)
        scales = e8m0(scales) if is_mx else scales.astype(np.float32) / np.float32(whole)
        return values * spread(scales, num_in, 1)

    return dequantised(name, (num_out, num_in), planes, dtype, dequantise)
