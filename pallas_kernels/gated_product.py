"""The first half of a feed-forward layer as one op: with a gate, ``activation(x Wg^T) * (x Wu^T)``.

As several operations, the product writes its numbers to memory, of which the activation makes as
many or half of them.
"""

import jax
from jaxengine.pallas_kernels.backends import load_function
from jaxengine.pallas_kernels.gated_product_reference import (
    ACTIVATIONS,
    activated_product_reference,
    gate,
    gated_product_reference,
)
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

__all__ = ["ACTIVATIONS", "activated_product", "gate", "gated_product"]

GATED_FUNCTIONS = {
    "triton": "jaxengine.pallas_kernels.few_rows_triton:gated_few_rows_triton",
    "mosaic": "jaxengine.pallas_kernels.gated_product_mosaic:gated_product_mosaic",
}
ACTIVATED_FUNCTIONS = {
    "triton": "jaxengine.pallas_kernels.few_rows_triton:activated_few_rows_triton",
}
# From here on Mosaic's kernel is faster, by measurement (an H100, D = 4096, F = 14336,
# benchmarks/LOG.md): 256 rows 101 us where XLA's two take 112, 2048 rows 710 instead of 739, 16384
# rows 5280 instead of 5792, the last two under a load that makes the GPU lower its clock.
MOSAIC_MIN_ROWS = 256


def gated_product(
    x: Float[Array, "T D"],
    weight: Float[Array, "2 F D"],
    *,
    bias: Float[Array, "2 F"] | None = None,
    activation: str,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """Multiply rows with the gate and the up projection, and gate one with the other.

    Shapes are local (under shard_map).

    Args:
        x: Rows.
        weight: Gate and up, [out, in] each.
        bias: Of both; None for none.
        activation: A key of ``ACTIVATIONS``.
        target: What the program is for.
        implementation: "reference", "triton" (few rows), "mosaic" (many), or None for the fastest
            that serves the shape.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``activation`` or ``implementation`` is
            unknown.
        NotImplementedError: If the named kernel does not serve the shape.
    """
    if weight.shape != (2, weight.shape[1], x.shape[1]):
        raise ValueError(f"weight is {weight.shape}, not (2, F, {x.shape[1]}) for rows {x.shape}")
    kernel = implementation or _preferred(x.shape[0], target)
    return _first_that_serves(
        GATED_FUNCTIONS, kernel, implementation is not None, x, weight, bias, activation
    )


def activated_product(
    x: Float[Array, "T D"],
    weight: Float[Array, "F D"],
    *,
    bias: Float[Array, " F"] | None = None,
    activation: str,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """Multiply rows with the up projection of a layer without a gate, and activate them.

    Shapes are local (under shard_map).

    Args:
        x: Rows.
        weight: [out, in].
        bias: Of the product; None for none.
        activation: A key of ``ACTIVATIONS``.
        target: What the program is for.
        implementation: "reference", "triton" (few rows), or None for the fastest that serves.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``activation`` or ``implementation`` is
            unknown.
        NotImplementedError: If the named kernel does not serve the shape.
    """
    if weight.shape != (weight.shape[0], x.shape[1]):
        raise ValueError(f"weight is {weight.shape}, not (F, {x.shape[1]}) for rows {x.shape}")
    kernel = implementation or _preferred(x.shape[0], target)
    return _first_that_serves(
        ACTIVATED_FUNCTIONS, kernel, implementation is not None, x, weight, bias, activation
    )


def _preferred(num_rows: int, target: Target) -> str:
    if target.is_gpu and num_rows <= FEW_ROWS:
        return "triton"
    if target.is_hopper and num_rows >= MOSAIC_MIN_ROWS:
        return "mosaic"
    return "reference"


def _first_that_serves(
    functions: dict[str, str],
    kernel: str,
    is_asked_for: bool,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation: str,
) -> jax.Array:
    _check(functions, kernel, is_asked_for, x, weight, bias, activation)
    if kernel in functions:
        try:
            return load_function(functions[kernel])(x, weight, bias, activation=activation)
        except NotImplementedError:
            if is_asked_for:
                raise
    if functions is GATED_FUNCTIONS:
        return gated_product_reference(x, weight, bias, activation=activation)
    return activated_product_reference(x, weight, bias, activation=activation)


def _check(
    functions: dict[str, str],
    kernel: str,
    is_asked_for: bool,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation: str,
) -> None:
    known = ("reference", *functions)
    if is_asked_for and kernel not in known:
        raise ValueError(f"implementation {kernel!r} is not one of {', '.join(known)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {sorted(ACTIVATIONS)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias is {bias.shape} but weight is {weight.shape}")
