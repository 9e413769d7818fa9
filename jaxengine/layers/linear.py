"""Linear layers over sharded weights, [out, in] as a checkpoint has them unless told otherwise.

Source: Megatron-LM, arXiv:1909.08053, section 3 (column- and row-parallel layers).
"""

import functools
import math
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.layers.parameter import parameter
from jaxengine.pallas_kernels.operands import Addends
from jaxengine.pallas_kernels.residual_norm import sum_addends
from jaxengine.pallas_kernels.split_product import split_product
from jaxengine.pallas_kernels.target import Target


class Linear(nnx.Module):
    """``x W^T + b`` with ``W`` of shape [*out_shape, *in_shape], left to be added up.

    Args:
        out_shape: Shape of an output row.
        in_shape: Shape of an input row.
        spec: Sharding of the weight. With a sharded input dimension the layer is row-parallel: the
            shards' products are parts of one sum, and the bias is the same on all of them.
        use_bias: Whether there is a bias of ``out_shape``.
        input_major: Hold the weight as [*in_shape, *out_shape]: XLA's products on a CPU read it
            up to 1.3 times as fast so, from 4 rows on.
        num_kv_heads: See ``parameter``.
        target: What the product runs on.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        *,
        spec: P,
        dtype: Any,
        target: Target,
        use_bias: bool = False,
        input_major: bool = False,
        num_kv_heads: int | None = None,
    ) -> None:
        out_spec, in_spec = spec[: len(out_shape)], spec[len(out_shape) :]
        self.num_out_axes = len(out_shape)
        self.input_major = input_major
        self.target = target
        if input_major:
            self.weight = parameter(
                (*in_shape, *out_shape),
                dtype,
                P(*in_spec, *out_spec),
                num_in_axes=len(in_shape),
                num_kv_heads=num_kv_heads,
            )
        else:
            self.weight = parameter((*out_shape, *in_shape), dtype, spec, num_kv_heads=num_kv_heads)
        bias = functools.partial(parameter, out_shape, dtype, P(*out_spec), init="zeros")
        self.bias = bias(num_kv_heads=num_kv_heads) if use_bias else None

    def addends(self, x: Float[Array, "T *in"]) -> Addends:
        """Multiply rows; return what is yet to be added up: parts [S, T, *out] and the bias."""
        rows = x.reshape(x.shape[0], -1)
        if self.input_major:
            parts = (rows @ self.matrix)[None]
        else:
            parts = split_product(rows, self.matrix, target=self.target)
        parts = parts.reshape(*parts.shape[:2], *self._out_shape)
        return Addends((parts,), None if self.bias is None else self.bias[...])

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Multiply rows; for a weight that every shard has whole."""
        return sum_addends(self.addends(x), x.dtype)

    @property
    def matrix(self) -> Array:
        """The weight as [out, in], or [in, out] if it is input-major."""
        num_in_axes = self.weight.ndim - self.num_out_axes
        num_first = num_in_axes if self.input_major else self.num_out_axes
        return self.weight[...].reshape(math.prod(self.weight.shape[:num_first]), -1)

    @property
    def _out_shape(self) -> tuple[int, ...]:
        shape = self.weight.shape
        return shape[-self.num_out_axes :] if self.input_major else shape[: self.num_out_axes]
