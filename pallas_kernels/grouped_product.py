"""Products of groups of rows with a weight each, as the experts of a mixture make them.

Rows come sorted by group. Costs are those of the rows that there are and of the weights that any
row needs: an expert that no token has chosen is neither read nor multiplied.
"""

import jax
from jaxengine.pallas_kernels.backends import call_kernel
from jaxengine.pallas_kernels.gating import Gating
from jaxengine.pallas_kernels.grouped_product_reference import (
    grouped_gated_product_reference,
    grouped_product_reference,
)
from jaxengine.pallas_kernels.grouped_product_xla import (
    grouped_gated_product_xla,
    grouped_product_xla,
)
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

__all__ = ["Gating", "grouped_gated_product", "grouped_product"]

IMPLEMENTATIONS = ("reference", "xla", "triton")
TRITON = "jaxengine.pallas_kernels.grouped_product_triton:grouped_product_triton"
GATED_TRITON = "jaxengine.pallas_kernels.grouped_product_triton:grouped_gated_product_triton"


def grouped_product(
    x: Float[Array, "R I"],
    weight: Float[Array, "E O I"],
    group_sizes: Int[Array, " E"],
    *,
    bias: Float[Array, "E O"] | None = None,
    row_weights: Float[Array, " R"] | None = None,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "R O"]:
    """Return ``row_weights * (x W^T + bias)``, with W and bias of each row's group.

    Shapes are local (under shard_map).

    Args:
        x: Rows; those of group 0 first, then those of group 1, and so on.
        weight: [out, in] of each group.
        group_sizes: Rows of each group. What is returned of rows behind the last group is
            unspecified, and may be NaN.
        bias: Of each group; None for none.
        row_weights: Factor on each row, in float32; None for 1.
        target: What the program is for.
        implementation: "reference", "xla" (a loop that serves everything), "triton" (16 bits, on
            GPUs), or None for the fastest that serves.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the shape.
    """
    _check(x, weight, group_sizes, bias, implementation)
    kernel = target.choice(implementation) or ("triton" if target.is_gpu else "xla")
    if kernel == "triton":
        try:
            return call_kernel(TRITON, x, weight, group_sizes, bias, row_weights)
        except NotImplementedError:
            if implementation is not None:
                raise
    function = grouped_product_reference if kernel == "reference" else grouped_product_xla
    return function(x, weight, group_sizes, bias, row_weights)


def grouped_gated_product(
    x: Float[Array, "T D"],
    weight: Float[Array, "E 2 F D"],
    group_sizes: Int[Array, " E"],
    *,
    rows: Int[Array, " R"] | None = None,
    bias: Float[Array, "E 2 F"] | None = None,
    gating: Gating,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """Multiply rows with gate and up projection of their groups, and gate one with the other.

    Shapes are local (under shard_map).

    Args:
        x: What is multiplied: rows sorted by group, or with ``rows`` in any order.
        weight: Gate and up of each group, [out, in] each.
        group_sizes: As of ``grouped_product``.
        rows: Row r of the result is made of row ``rows[r]`` of x; None for row r.
        bias: Of both; None for none.
        gating: How the two become one.
        target: What the program is for.
        implementation: As of ``grouped_product``.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the shape.
    """
    _check(x, weight, group_sizes, bias, implementation)
    if weight.shape[1] != 2:
        raise ValueError(f"weight is {weight.shape}, not (E, 2, F, {x.shape[1]})")
    kernel = target.choice(implementation) or ("triton" if target.is_gpu else "xla")
    if kernel == "triton":
        try:
            return call_kernel(GATED_TRITON, x, weight, group_sizes, rows, bias, gating=gating)
        except NotImplementedError:
            if implementation is not None:
                raise
    if kernel == "reference":
        return grouped_gated_product_reference(x, weight, group_sizes, rows, bias, gating=gating)
    return grouped_gated_product_xla(x, weight, group_sizes, rows, bias, gating=gating)


def _check(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    bias: jax.Array | None,
    implementation: str | None,
) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
        )
    if weight.shape[-1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)} but weight is {weight.dtype}{list(weight.shape)}"
        )
    if group_sizes.shape != weight.shape[:1]:
        raise ValueError(f"group_sizes is {group_sizes.shape} but weight is {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias is {bias.shape} but weight is {weight.shape}")
