"""From products' parts to the next products' rows: sum, residual stream, norm, as one op.

The parts are those of split products (``split_product``) and those of the shards. A decode step is
mostly launches, so that where it is small a kernel does all of it; elsewhere XLA does.
"""

import functools

import jax
from jaxengine.pallas_kernels.all_reduce import all_reduce
from jaxengine.pallas_kernels.backends import call_kernel
from jaxengine.pallas_kernels.norms import joining, normalise, sum_addends
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.residual_norm_reference import residual_norm_reference
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

__all__ = ["normalise", "residual_norm", "residual_sum", "sum_addends"]

TRITON = "jaxengine.pallas_kernels.residual_norm_triton:residual_norm_triton"
TRITON_OVER_GPUS = "jaxengine.pallas_kernels.all_reduce_triton:all_reduce_norm_triton"


def residual_norm(
    addends: Addends,
    residual: Float[Array, "T D"],
    norms: tuple[Norm, ...],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    peers: Peers | None,
    axis_name: str,
    target: Target,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """Add a sum to the residual stream, and normalise the stream.

    ``total = residual + scale * inner(sum over parts and shards + bias)``.

    Args:
        addends: This shard's, and the bias of all.
        residual: The same on all shards.
        norms: Of the stream after the sum: none, one, or several of the same stream.
        inner: Norm of the sum before it joins the stream (Gemma 2, OLMo 2); None for none.
        scale: Factor on what joins the stream (Granite).
        peers: With the number of this sum over the shards; None where XLA's has to serve.
        axis_name: Of the shards, under ``shard_map``.
        target: The devices.
        implementation: "reference", "triton", or None for the fastest that serves the arrays.

    Returns:
        The new residual stream, and its norms; the same on all shards.

    Raises:
        ValueError: If ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the arrays.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    chosen = target.choice(implementation)
    if chosen == "reference":
        return residual_norm_reference(
            addends, residual, norms, inner=inner, scale=scale, axis_name=axis_name
        )
    if chosen == "triton" or _prefers_triton(addends, len(norms), inner, peers, target):
        try:
            if peers is not None:
                return call_kernel(
                    TRITON_OVER_GPUS, addends, peers, residual, norms, inner, scale=scale
                )
            if jax.lax.axis_size(axis_name) > 1:
                raise NotImplementedError("residual norm in Triton: several shards without peers")
            return call_kernel(TRITON, addends, residual, norms, inner, scale=scale)
        except NotImplementedError:
            if implementation is not None:
                raise
    total = _sum_by_xla(addends, residual, inner, scale=scale, peers=peers, axis_name=axis_name)
    return total, tuple(normalise(total, norm) for norm in norms)


def residual_sum(
    addends: Addends,
    residual: Float[Array, "T D"],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    peers: Peers | None,
    axis_name: str,
    target: Target,
) -> Float[Array, "T D"]:
    """Add a sum to the residual stream, as ``residual_norm`` does, where no norm follows."""
    total, _ = residual_norm(
        addends,
        residual,
        (),
        inner=inner,
        scale=scale,
        peers=peers,
        axis_name=axis_name,
        target=target,
    )
    return total


def _prefers_triton(
    addends: Addends, num_norms: int, inner: Norm | None, peers: Peers | None, target: Target
) -> bool:
    if num_norms == 0 and inner is None:
        return False  # a sum alone is XLA's, or of several GPUs a kernel's without rows
    # A program of the kernel takes a row, which suits few of them; and where there are many, XLA
    # adds the residual in the product itself.
    return peers is not None or (addends.num_rows <= FEW_ROWS and target.is_gpu)


def _sum_by_xla(
    addends: Addends,
    residual: jax.Array,
    inner: Norm | None,
    *,
    scale: float,
    peers: Peers | None,
    axis_name: str,
) -> jax.Array:
    """The sum over shards may be a kernel's; what is around it is not."""
    is_alone = jax.lax.axis_size(axis_name) == 1
    own = sum_addends(addends, residual.dtype, with_bias=is_alone)
    bias = None if is_alone else addends.bias
    if bias is None and inner is None and scale == 1:
        return all_reduce(own, peers, axis_name=axis_name, residual=residual)
    x = joining(
        all_reduce(own, peers, axis_name=axis_name),
        residual.dtype,
        bias=bias,
        inner=None if inner is None else functools.partial(normalise, norm=inner),
        scale=scale,
    )
    return residual + x
