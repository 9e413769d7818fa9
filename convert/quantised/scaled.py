"""Weights stored in 8 bits with scales: FP8 of every maker, INT8, and blocks of both.

``w[o, i] = q[o, i] * s``, where s is one number, one a row, or one a block: how many there are
along each axis says which. DeepSeek's ``weight_scale_inv`` is such a scale, whatever its name.
Sources: the published layouts of compressed-tensors, DeepSeek-V3, ModelOpt, FBGEMM and EETQ.
"""

from __future__ import annotations

import numpy as np
from jaxengine.convert.quantised.tensor import (
    DequantisedTensor,
    Planes,
    dequantised,
    float32,
    spread,
)

SCALES = ("weight_scale", "weight_scale_inv", "weight_scales", "scale")
SUFFIXES = ("weight", *SCALES, "input_scale", "input_scale_ub", "activation_scale", "SCB")


def tensor(
    name: str, planes: Planes, dtype: np.dtype, *, block: tuple[int, int] | None = None
) -> DequantisedTensor:
    """The weight of a linear layer.

    Args:
        name: Of the weight.
        planes: The weight and one of ``SCALES``, or bitsandbytes' ``SCB``.
        dtype: What the values are rounded to.
        block: Rows and columns of a block; None where the scales' shape says it.
    """
    weight = planes["weight"]
    num_out, num_in = weight.shape
    if "SCB" in planes:  # bitsandbytes: the largest magnitude of a row
        scale = float32(planes["SCB"]).reshape(num_out, 1) / 127
    else:
        scale = float32(next(planes[suffix] for suffix in SCALES if suffix in planes))
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if block is not None and scale.shape == tuple(
        -(-n // b) for n, b in zip((num_out, num_in), block, strict=True)
    ):
        scale = np.repeat(np.repeat(scale, block[0], 0)[:num_out], block[1], 1)[:, :num_in]
    rows = spread(scale, num_out, 0) if scale.shape[0] > 1 else scale

    def dequantise(start: int, stop: int) -> np.ndarray:
        own = rows[start:stop] if rows.shape[0] > 1 else rows
        own = spread(own, num_in, 1) if own.shape[1] > 1 else own
        return weight.rows(start, stop).astype(np.float32) * own

    return dequantised(name, (num_out, num_in), planes, dtype, dequantise)
