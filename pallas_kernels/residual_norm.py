"""From a product's parts to the next product's rows: sum, residual stream, norm, as one op.

The parts are those of a split product (``split_product``) and those of the shards. A decode step is
mostly launches, so that where it is small a kernel does all of it; elsewhere XLA does.
"""

import jax
from jaxengine.pallas_kernels.all_reduce import all_reduce
from jaxengine.pallas_kernels.all_reduce_triton import all_reduce_norm_triton
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.residual_norm_reference import (
    residual_norm_reference,
    rms_norm,
    sum_parts,
)
from jaxengine.pallas_kernels.residual_norm_triton import residual_norm_triton
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

__all__ = ["residual_norm", "residual_sum", "rms_norm", "sum_parts"]


def residual_norm(
    parts: Float[Array, "S T D"],
    residual: Float[Array, "T D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    peers: Peers | None,
    axis_name: str,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Add the sum of all parts to the residual stream, and normalise it.

    Args:
        parts: This shard's, in float32 or the residual's dtype.
        residual: The same on all shards.
        weight: Of the norm.
        eps: Of the norm, added to the mean square.
        peers: With the number of this sum over the shards; None where XLA's has to serve.
        axis_name: Of the shards, under ``shard_map``.
        implementation: "reference", "triton", or None for the fastest that serves the arrays.

    Returns:
        The new residual stream, and its norm; the same on all shards.

    Raises:
        ValueError: If ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the arrays.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    if implementation == "triton" or (implementation is None and _prefers_triton(parts, peers)):
        try:
            if peers is not None:
                return all_reduce_norm_triton(parts, peers, residual, weight, eps=eps)
            if jax.lax.axis_size(axis_name) > 1:
                raise NotImplementedError("residual norm in Triton: several shards without peers")
            return residual_norm_triton(parts, residual, weight, eps=eps)
        except NotImplementedError:
            if implementation is not None:
                raise
    if implementation == "reference":
        return residual_norm_reference(parts, residual, weight, eps=eps, axis_name=axis_name)
    total = residual_sum(parts, residual, peers=peers, axis_name=axis_name)
    return total, rms_norm(total, weight, eps)


def _prefers_triton(parts: jax.Array, peers: Peers | None) -> bool:
    # A program of the kernel takes a row, which suits few of them; and where there are many, XLA
    # adds the residual in the product itself.
    is_small = parts.shape[1] <= FEW_ROWS
    return peers is not None or (is_small and jax.default_backend() == "gpu")


def residual_sum(
    parts: Float[Array, "S T D"],
    residual: Float[Array, "T D"],
    *,
    peers: Peers | None,
    axis_name: str,
) -> Float[Array, "T D"]:
    """Add the sum of all parts to the residual stream.

    Args:
        parts: This shard's, in float32 or the residual's dtype.
        residual: The same on all shards.
        peers: With the number of this sum over the shards; None where XLA's has to serve.
        axis_name: Of the shards, under ``shard_map``.
    """
    own = sum_parts(parts, residual.dtype)
    return all_reduce(own, peers, axis_name=axis_name, residual=residual)
