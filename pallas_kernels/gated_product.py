"""The first half of a feed-forward layer as one op, with a gate or without.

``activation(x Wg^T) * (x Wu^T)``, or ``activation(x W^T)``. As two operations, the product writes
all its numbers to memory, of which the activation makes as many or half.
"""

from collections.abc import Collection

import jax
from jaxengine.pallas_kernels.activations import ACTIVATIONS
from jaxengine.pallas_kernels.backends import call_kernel
from jaxengine.pallas_kernels.gated_product_reference import (
    activated_product_reference,
    gate,
    gated_product_reference,
)
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

__all__ = ["ACTIVATIONS", "activated_product", "gate", "gated_product"]

GATED_KERNELS = {
    "triton": "jaxengine.pallas_kernels.few_rows_triton:gated_few_rows_triton",
    "mosaic": "jaxengine.pallas_kernels.gated_product_mosaic:gated_product_mosaic",
}
ACTIVATED_KERNELS = {
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
        target: The devices.
        implementation: "reference", "triton" (few rows), "mosaic" (many), or None for the fastest
            that serves the shape.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``activation`` or ``implementation`` is
            unknown.
        NotImplementedError: If the named kernel does not serve the shape.
    """
    _check(activation, implementation, GATED_KERNELS)
    if weight.shape != (2, weight.shape[1], x.shape[1]):
        raise ValueError(f"weight is {weight.shape}, not (2, F, {x.shape[1]}) for rows {x.shape}")
    _check_dtype_and_bias(x, weight, bias)
    kernel = target.choice(implementation) or _preferred(x.shape[0], target)
    if kernel in GATED_KERNELS:
        try:
            options = {"num_sms": target.num_sms} if kernel == "mosaic" else {}
            return call_kernel(
                GATED_KERNELS[kernel], x, weight, bias, activation=activation, **options
            )
        except NotImplementedError:
            if implementation is not None:
                raise
    return gated_product_reference(x, weight, bias, activation=activation)


def activated_product(
    x: Float[Array, "T D"],
    weight: Float[Array, "F D"],
    *,
    bias: Float[Array, " F"] | None = None,
    activation: str,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """Multiply rows with a projection and activate the result: a layer without a gate.

    Arguments and errors are those of ``gated_product``, but for the weight [F, D], the bias [F] and
    no "mosaic".
    """
    _check(activation, implementation, ACTIVATED_KERNELS)
    if weight.shape != (weight.shape[0], x.shape[1]):
        raise ValueError(f"weight is {weight.shape}, not (F, {x.shape[1]}) for rows {x.shape}")
    _check_dtype_and_bias(x, weight, bias)
    kernel = target.choice(implementation) or _preferred(x.shape[0], target)
    if kernel in ACTIVATED_KERNELS:
        try:
            return call_kernel(ACTIVATED_KERNELS[kernel], x, weight, bias, activation=activation)
        except NotImplementedError:
            if implementation is not None:
                raise
    return activated_product_reference(x, weight, bias, activation=activation)


def _preferred(num_rows: int, target: Target) -> str:
    if target.is_gpu and num_rows <= FEW_ROWS:
        return "triton"
    if num_rows >= MOSAIC_MIN_ROWS and target.is_hopper:
        return "mosaic"
    return "reference"


def _check(activation: str, implementation: str | None, kernels: Collection[str]) -> None:
    if implementation not in (None, "reference", *kernels):
        known = ", ".join(("reference", *kernels))
        raise ValueError(f"implementation {implementation!r} is not one of {known}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {sorted(ACTIVATIONS)}")


def _check_dtype_and_bias(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> None:
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias is {bias.shape} but weight is {weight.shape}")
