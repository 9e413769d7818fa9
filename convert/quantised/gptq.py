"""GPTQ: 2, 3, 4 or 8 bits, groups along the input, whose order ``desc_act`` permutes.

``w[o, i] = (q[i, o] - z[g[i], o]) * s[g[i], o]`` with ``g = g_idx``, or i // group size without it.
The first version of the format stores zero points less one; "gptq_v2" stores them as they are.
Source: the published layout of AutoGPTQ's QuantLinear; arXiv:2210.17323.
"""

from __future__ import annotations

import numpy as np
from jaxengine.convert.quantised.packing import unpack
from jaxengine.convert.quantised.tensor import DequantisedTensor, Planes, dequantised
from jaxengine.convert.tensors import read

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)


def tensor(name: str, planes: Planes, *, bits: int, is_v2: bool) -> DequantisedTensor:
    """The weight of a linear layer.

    Args:
        name: Of the weight.
        planes: ``qweight``, ``qzeros``, ``scales`` and mostly ``g_idx``.
        bits: Of a value.
        is_v2: Whether zero points are stored as they are.
    """
    qweight, qzeros, scales = (planes[suffix] for suffix in SUFFIXES[:3])
    num_in, num_out = qweight.shape[0] * 32 // bits, scales.shape[1]
    num_groups = scales.shape[0]
    if "g_idx" in planes:
        group = read(planes["g_idx"])
        if group.shape != (num_in,) or group.min() < 0 or group.max() >= num_groups:
            raise ValueError(f"{name}: g_idx does not name one of {num_groups} groups for each "
                             f"of {num_in} inputs")  # fmt: skip
    else:
        group = np.arange(num_in) // -(-num_in // num_groups)

    def dequantise(start: int, stop: int) -> np.ndarray:
        q = unpack(qweight.rows(0, qweight.shape[0])[:, start:stop], bits, axis=0)
        z = unpack(read(qzeros), bits, axis=1)[:, start:stop].astype(np.float32) + (not is_v2)
        s = scales.rows(0, num_groups)[:, start:stop].astype(np.float32)
        return ((q.astype(np.float32) - z[group]) * s[group]).T

    return dequantised(name, (num_out, num_in), planes, scales.dtype, dequantise)
