"""Linear and embedding layers over sharded weights, in HF's orientation: weights are [out, in].

Source: Megatron-LM, arXiv:1909.08053, section 3 (column- and row-parallel layers).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.sharding import TENSOR_AXIS, sum_over_shards


def parameter(shape: tuple[int, ...], dtype: Any, spec: P, init: str = "normal") -> nnx.Param:
    """Declare a weight; ``spec`` says how it is cut, ``init`` what a dummy one holds.

    Models are only ever built under ``nnx.eval_shape``: the zeros are never made.
    """
    return nnx.Param(jnp.zeros(shape, dtype), spec=spec, init=init)


class Linear(nnx.Module):
    """``y = x W^T + b`` with ``W`` of shape [*out_shape, *in_shape].

    Args:
        out_shape: Shape of an output row.
        in_shape: Shape of an input row.
        spec: Sharding of the weight. A sharded input dimension makes the layer row-parallel: the
            shards' partial sums are added, the bias once.
        use_bias: Whether there is a bias of ``out_shape``.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        *,
        spec: P,
        dtype: Any,
        use_bias: bool = False,
    ) -> None:
        self.num_out_axes = len(out_shape)
        self.is_row_parallel = any(axis is not None for axis in spec[self.num_out_axes :])
        self.weight = parameter((*out_shape, *in_shape), dtype, spec)
        bias_spec = P(*spec[: self.num_out_axes])
        self.bias = parameter(out_shape, dtype, bias_spec) if use_bias else None

    def __call__(self, x: Float[Array, "T *in"]) -> Float[Array, "T *out"]:
        weight = self.weight[...]
        out_shape = weight.shape[: self.num_out_axes]
        weight = weight.reshape(math.prod(out_shape), -1)
        y = project(x.reshape(x.shape[0], -1), weight)
        if self.is_row_parallel:
            y = sum_over_shards(y)
        y = y.reshape(x.shape[0], *out_shape)
        return y if self.bias is None else y + self.bias[...]


def project(x: Float[Array, "T I"], weight: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """``x W^T``, accumulated in float32 by the matrix unit, returned in x's dtype."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


class Embedding(nnx.Module):
    """Token embedding, the vocabulary cut over the shards; also the tied output projection."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: Any) -> None:
        self.weight = parameter((vocab_size, hidden_size), dtype, P(TENSOR_AXIS, None))

    def __call__(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        weight = self.weight[...]
        local = token_ids - jax.lax.axis_index(TENSOR_AXIS) * weight.shape[0]
        is_here = (local >= 0) & (local < weight.shape[0])
        rows = weight[jnp.where(is_here, local, 0)]
        return sum_over_shards(jnp.where(is_here[:, None], rows, 0))

    def logits(self, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Scores over the whole vocabulary, gathered from the shards."""
        local = project(x, self.weight[...])
        return jax.lax.all_gather(local, TENSOR_AXIS, axis=1, tiled=True)
