"""Root-mean-square normalisation."""

from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.layers.linear import add_parts, parameter
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.residual_norm import residual_norm, rms_norm
from jaxengine.sharding import TENSOR_AXIS


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight`` over the last axis, computed in float32.

    Source: arXiv:1910.07467. The product with the weight is taken after the cast, as HF does.
    """

    def __init__(self, size: int, *, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.weight = parameter((size,), dtype, P(None), init="ones")

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.weight[...], self.eps)

    def after_sum(
        self,
        parts: Float[Array, "S T D"],
        residual: Float[Array, "T D"],
        peers: Peers | None = None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
        """Add a product to the residual stream first; return the stream, and its norm.

        A subclass with a ``__call__`` of its own is asked for the norm.

        Args:
            parts: Of the product, over all shards (``Linear.parts``).
            residual: The stream.
            peers: How the shards add up; None for XLA's way.
        """
        if type(self).__call__ is not RMSNorm.__call__:  # a norm of another kind: kernels have not
            total = add_parts(residual, parts, peers)
            return total, self(total)
        return residual_norm(
            parts, residual, self.weight[...], eps=self.eps, peers=peers, axis_name=TENSOR_AXIS
        )
