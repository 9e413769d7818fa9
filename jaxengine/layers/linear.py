"""Linear and embedding layers over sharded weights, [out, in] as HF has them unless told otherwise.

Source: Megatron-LM, arXiv:1909.08053, section 3 (column- and row-parallel layers).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.all_reduce import all_reduce
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.residual_norm import residual_sum
from jaxengine.pallas_kernels.split_product import project, split_product
from jaxengine.sharding import TENSOR_AXIS


def parameter(
    shape: tuple[int, ...], dtype: Any, spec: P, *, init: str = "normal", num_in_axes: int = 0
) -> nnx.Param:
    """Declare a weight.

    Models are only ever built under ``nnx.eval_shape``: the zeros are never made.

    Args:
        shape: Shape in memory.
        dtype: Type in memory.
        spec: How it is cut.
        init: What a dummy one holds.
        num_in_axes: Axes that stand first here and last in a checkpoint (see ``Linear``).
    """
    return nnx.Param(jnp.zeros(shape, dtype), spec=spec, init=init, num_in_axes=num_in_axes)


class Linear(nnx.Module):
    """``y = x W^T + b`` with ``W`` of shape [*out_shape, *in_shape].

    Args:
        out_shape: Shape of an output row.
        in_shape: Shape of an input row.
        spec: Sharding of the weight. A sharded input dimension makes the layer row-parallel: the
            shards' products are yet to be added up.
        use_bias: Whether there is a bias of ``out_shape``.
        input_major: Hold the weight as [*in_shape, *out_shape]: XLA's products on a CPU read it
            up to 1.3 times as fast so, from 4 rows on.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        *,
        spec: P,
        dtype: Any,
        use_bias: bool = False,
        input_major: bool = False,
    ) -> None:
        out_spec, in_spec = spec[: len(out_shape)], spec[len(out_shape) :]
        self.num_out_axes = len(out_shape)
        self.num_last_axes = len(out_shape if input_major else in_shape)
        self.is_row_parallel = any(axis is not None for axis in in_spec)
        self.input_major = input_major
        if input_major:
            self.weight = parameter(
                (*in_shape, *out_shape), dtype, P(*in_spec, *out_spec), num_in_axes=len(in_shape)
            )
        else:
            self.weight = parameter((*out_shape, *in_shape), dtype, spec)
        self.bias = parameter(out_shape, dtype, P(*out_spec)) if use_bias else None

    def __call__(self, x: Float[Array, "T *in"]) -> Float[Array, "T *out"]:  # noqa: F821
        """Multiply rows, in a layer whose shards have nothing to add up."""
        assert not self.is_row_parallel, "a row-parallel layer has parts"
        y = self._product(x)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: Float[Array, "T *in"]) -> Float[Array, "S T *out"]:
        """Multiply rows; return parts that are yet to be added up, over the shards too.

        A row-parallel layer's bias is in the first shard's.

        Args:
            x: Rows.
        """
        if self.bias is None and not self.input_major:
            parts = split_product(x.reshape(x.shape[0], -1), self.matrix)
            return parts.reshape(*parts.shape[:2], *self.weight.shape[: self.num_out_axes])
        y = self._product(x)
        if self.bias is not None:
            bias = self.bias[...]
            if self.is_row_parallel:
                bias = jnp.where(jax.lax.axis_index(TENSOR_AXIS) == 0, bias, 0)
            y += bias
        return y[None]

    @property
    def matrix(self) -> Array:
        """The weight as [out, in], or [in, out] if it is input-major."""
        num_rows = math.prod(self.weight.shape[: len(self.weight.shape) - self.num_last_axes])
        return self.weight[...].reshape(num_rows, -1)

    def _product(self, x: Float[Array, "T *in"]) -> Float[Array, "T *out"]:  # noqa: F821
        shape, rows = self.weight.shape, x.reshape(x.shape[0], -1)
        if self.input_major:
            return (rows @ self.matrix).reshape(x.shape[0], *shape[-self.num_out_axes :])
        return project(rows, self.matrix).reshape(x.shape[0], *shape[: self.num_out_axes])


def add_parts(
    residual: Float[Array, "T D"], parts: Float[Array, "S T D"], peers: Peers | None
) -> Float[Array, "T D"]:
    """Add a product, over all shards, to the residual stream, where no norm follows.

    Args:
        residual: The stream.
        parts: From ``Linear.parts``.
        peers: How the shards add up; None for XLA's way.
    """
    return residual_sum(parts, residual, peers=peers, axis_name=TENSOR_AXIS)


class Embedding(nnx.Module):
    """Token embedding, the vocabulary cut over the shards; also the tied output projection.

    With ``input_major`` it is held as the projection likes it, [D, V]; the few columns that a
    step looks up cost little.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: Any, input_major: bool = False
    ) -> None:
        self.input_major = input_major
        if input_major:
            shape, spec = (hidden_size, vocab_size), P(None, TENSOR_AXIS)
        else:
            shape, spec = (vocab_size, hidden_size), P(TENSOR_AXIS, None)
        self.weight = parameter(shape, dtype, spec, num_in_axes=int(input_major))

    def __call__(
        self, token_ids: Int[Array, " T"], peers: Peers | None = None
    ) -> Float[Array, "T D"]:
        """Look up rows; ``peers`` is how the shards' are put together, None for XLA's way."""
        weight = self.weight[...]
        num_rows = weight.shape[1 if self.input_major else 0]
        local = token_ids - jax.lax.axis_index(TENSOR_AXIS) * num_rows
        is_here = (local >= 0) & (local < num_rows)
        row = jnp.where(is_here, local, 0)
        rows = weight[:, row].T if self.input_major else weight[row]
        found = jnp.where(is_here[:, None], rows, 0)
        return all_reduce(found, peers, axis_name=TENSOR_AXIS)

    def logits(self, x: Float[Array, "B D"]) -> Float[Array, "B local_V"]:
        """Scores of this shard's part of the vocabulary."""
        weight = self.weight[...]
        return x @ weight if self.input_major else project(x, weight)
