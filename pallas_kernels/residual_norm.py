"""From products to the next product's rows: sum, residual stream, norm, as one op.

What is due are the parts of split products (``split_product``), of one or of several that are added
to the stream together, and those of the shards. A decode step is mostly launches, so that where it
is small a kernel does all of it; elsewhere XLA does.
"""

import jax
from jaxengine.pallas_kernels.all_reduce import all_reduce
from jaxengine.pallas_kernels.all_reduce_triton import all_reduce_norm_triton
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.residual_norm_reference import (
    due_sum,
    normalise,
    residual_norm_reference,
    scaled,
    sum_addends,
    sum_parts,
    with_bias,
)
from jaxengine.pallas_kernels.residual_norm_triton import residual_norm_triton
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

__all__ = [
    *("due_sum", "normalise", "residual_norm", "residual_sum", "sum_addends", "sum_parts"),
]

Rows = Float[Array, "T D"]


def residual_norm(
    addends: Addends,
    residual: Rows,
    norms: tuple[Norm, ...],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    peers: Peers | None,
    axis_name: str,
    target: Target,
    implementation: str | None = None,
) -> tuple[Rows, tuple[Rows, ...]]:
    """Add what is due to the residual stream, and normalise the stream.

    ``total = residual + scale * inner(sum of addends)``, and ``norm(total)`` for each norm.

    Args:
        addends: This shard's, and the bias of all.
        residual: The same on all shards.
        norms: Of the stream, for those who read it next.
        inner: Norm of the sum before it joins the stream; None for none.
        scale: Factor on what joins.
        peers: With the number of this sum over the shards; None where XLA's has to serve.
        axis_name: Of the shards, under ``shard_map``.
        target: What the program is for.
        implementation: "reference", "triton", or None for the fastest that serves the arrays.

    Returns:
        The new residual stream, and its norms in their order; the same on all shards.

    Raises:
        ValueError: If ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the arrays.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    if implementation == "triton" or (
        implementation is None and _prefers_triton(residual, norms, peers, target)
    ):
        try:
            if peers is not None:
                return all_reduce_norm_triton(
                    addends, peers, residual, norms, inner=inner, scale=scale
                )
            if jax.lax.axis_size(axis_name) > 1:
                raise NotImplementedError("residual norm in Triton: several shards without peers")
            return residual_norm_triton(addends, residual, norms, inner=inner, scale=scale)
        except NotImplementedError:
            if implementation is not None:
                raise
    if implementation == "reference" or target.implementation == "reference":
        return residual_norm_reference(
            addends, residual, norms, inner=inner, scale=scale, axis_name=axis_name
        )
    total = residual_sum(
        addends, residual, inner=inner, scale=scale, peers=peers, axis_name=axis_name
    )
    return total, tuple(normalise(total, norm) for norm in norms)


def _prefers_triton(
    residual: jax.Array, norms: tuple[Norm, ...], peers: Peers | None, target: Target
) -> bool:
    if target.implementation is not None or not norms:
        return False  # a sum alone is XLA's or the all-reduce's
    # A program of the kernel takes a row, which suits few of them; and where there are many, XLA
    # adds the residual in the product itself.
    return peers is not None or (residual.shape[0] <= FEW_ROWS and target.is_gpu)


def residual_sum(
    addends: Addends,
    residual: Rows,
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    peers: Peers | None,
    axis_name: str,
) -> Rows:
    """Add what is due to the residual stream, where no norm follows.

    Args:
        addends: This shard's, and the bias of all.
        residual: The same on all shards.
        inner: Norm of the sum before it joins the stream; None for none.
        scale: Factor on what joins.
        peers: With the number of this sum over the shards; None where XLA's has to serve.
        axis_name: Of the shards, under ``shard_map``.
    """
    if peers is None:
        if addends.is_single and inner is None and scale == 1:
            own = sum_parts(addends.arrays[0], residual.dtype)
            return all_reduce(own, None, axis_name=axis_name, residual=residual)
        return residual + due_sum(addends, residual.dtype, inner, scale, axis_name)
    own = sum_addends(Addends(addends.arrays), residual.dtype)
    if addends.bias is None and inner is None and scale == 1:
        return all_reduce(own, peers, axis_name=axis_name, residual=residual)
    total = with_bias(all_reduce(own, peers, axis_name=axis_name), addends.bias)
    return residual + scaled(total if inner is None else normalise(total, inner), scale)
