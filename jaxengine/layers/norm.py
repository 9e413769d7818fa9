"""Normalisation, on its own and behind a sum that is due."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.convert.model_spec import NormSpec
from jaxengine.layers.parameter import parameter
from jaxengine.pallas_kernels.operands import Addends
from jaxengine.pallas_kernels.operands import Norm as NormOperand
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.residual_norm import normalise, residual_norm
from jaxengine.pallas_kernels.target import Target
from jaxengine.sharding import TENSOR_AXIS


class Norm(nnx.Module):
    """A norm over the last axis, with the weight and the bias that its spec has.

    Args:
        shape: Of the weight: [D], or with leading axes where heads have weights of their own.
        spec: What is computed.
        dtype: Type of the parameters.
        cut: How they are cut over the shards; None for not at all.
    """

    def __init__(
        self, shape: tuple[int, ...], spec: NormSpec, *, dtype: Any, cut: P | None = None
    ) -> None:
        self.spec = spec
        placed = P(*(None,) * len(shape)) if cut is None else cut
        init = "zeros" if spec.offset else "ones"
        self.weight = parameter(shape, dtype, placed, init=init) if spec.has_weight else None
        self.bias = parameter(shape, dtype, placed, init="zeros") if spec.has_bias else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return normalise(x, self.operand)

    @property
    def operand(self) -> NormOperand:
        """The norm as ops take it."""
        return NormOperand(
            weight=None if self.weight is None else self.weight[...],
            bias=None if self.bias is None else self.bias[...],
            eps=self.spec.eps,
            kind=self.spec.kind,
            offset=self.spec.offset,
        )


def join(
    addends: Addends | None,
    residual: Float[Array, "T D"],
    norms: Sequence[Norm],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    peers: Peers | None = None,
    target: Target,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """Add what is due to the residual stream, and normalise the stream for those who read it.

    Args:
        addends: Of products, over all shards; None if nothing is due.
        residual: The stream.
        norms: Of the readers.
        inner: Norm of the sum before it joins the stream; None for none.
        scale: Factor on the sum.
        peers: How the shards add up; None for XLA's way.
        target: What the ops run on.

    Returns:
        The stream, and its norms in their order.
    """
    if addends is None:
        return residual, tuple(norm(residual) for norm in norms)
    return residual_norm(
        addends,
        residual,
        tuple(norm.operand for norm in norms),
        inner=None if inner is None else inner.operand,
        scale=scale,
        peers=peers,
        axis_name=TENSOR_AXIS,
        target=target,
    )
