"""The first half of a gated feed-forward layer as one op: ``activation(x Wg^T) * (x Wu^T)``.

As two operations, the product writes 2F numbers a row to memory, of which the activation makes F.
"""

import jax
from jaxengine.pallas_kernels.backends import is_hopper, load_function
from jaxengine.pallas_kernels.gated_product_reference import (
    ACTIVATIONS,
    gate,
    gated_product_reference,
)
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

__all__ = ["ACTIVATIONS", "gate", "gated_product"]

FUNCTIONS = {
    "triton": "jaxengine.pallas_kernels.few_rows_triton:gated_few_rows_triton",
    "mosaic": "jaxengine.pallas_kernels.gated_product_mosaic:gated_product_mosaic",
}
# From here on Mosaic's kernel is faster, by measurement (an H100, D = 4096, F = 14336,
# benchmarks/LOG.md): 256 rows 101 us where XLA's two take 112, 2048 rows 710 instead of 739, 16384
# rows 5280 instead of 5792, the last two under a load that makes the GPU lower its clock.
MOSAIC_MIN_ROWS = 256


def gated_product(
    x: Float[Array, "T D"],
    weight: Float[Array, "2 F D"],
    *,
    activation: str,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """Multiply rows with the gate and the up projection, and gate one with the other.

    Shapes are local (under shard_map).

    Args:
        x: Rows.
        weight: Gate and up, [out, in] each.
        activation: A key of ``ACTIVATIONS``.
        implementation: "reference", "triton" (few rows), "mosaic" (many), or None for the fastest
            that serves the shape.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``activation`` or ``implementation`` is
            unknown.
        NotImplementedError: If the named kernel does not serve the shape.
    """
    _check(x, weight, activation, implementation)
    kernel = _preferred(x.shape[0]) if implementation is None else implementation
    if kernel in FUNCTIONS:
        try:
            return load_function(FUNCTIONS[kernel])(x, weight, activation=activation)
        except NotImplementedError:
            if implementation is not None:
                raise
    return gated_product_reference(x, weight, activation=activation)


def _preferred(num_rows: int) -> str:
    if jax.default_backend() == "gpu" and num_rows <= FEW_ROWS:
        return "triton"
    if num_rows >= MOSAIC_MIN_ROWS and jax.default_backend() == "gpu" and is_hopper():
        return "mosaic"
    return "reference"


def _check(x: jax.Array, weight: jax.Array, activation: str, implementation: str | None) -> None:
    if implementation not in (None, "reference", *FUNCTIONS):
        known = ", ".join(("reference", *FUNCTIONS))
        raise ValueError(f"implementation {implementation!r} is not one of {known}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {sorted(ACTIVATIONS)}")
    if weight.shape != (2, weight.shape[1], x.shape[1]):
        raise ValueError(f"weight is {weight.shape}, not (2, F, {x.shape[1]}) for rows {x.shape}")
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}")
