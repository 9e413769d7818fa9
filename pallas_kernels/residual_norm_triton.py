"""Sum of a product's parts, residual added, normalised: one Pallas Triton kernel for few rows.

Grid (rows,): a program takes one row.
Limits: 16-bit floats, rows of up to 16,384 numbers; else NotImplementedError.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

MAX_COLUMNS = 16384
NUMBERS_OF_A_THREAD = 8


def residual_norm_triton(
    parts: Float[Array, "S T D"],
    residual: Float[Array, "T D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Return the residual stream after the sum of ``parts``, and its norm, as ``residual_norm``.

    Args:
        parts: To be added up; rounded to the residual's dtype after that.
        residual: Rows.
        weight: Of the norm.
        eps: Of the norm.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If the dtype or the size is not served.
    """
    if residual.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"residual norm in Triton: {residual.dtype}, not of 16 bits")
    if residual.shape[1] > MAX_COLUMNS:
        raise NotImplementedError(f"residual norm in Triton: {residual.shape[1]} columns")
    return _launch(eps, interpret, parts, residual, weight)


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _launch(
    eps: float,
    interpret: bool,
    parts: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    T, D = residual.shape
    like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    num_warps = max(1, min(16, pl.next_power_of_2(D) // (32 * NUMBERS_OF_A_THREAD)))
    total, normed = pl.pallas_call(
        functools.partial(_kernel, eps),
        grid=(T,),
        out_shape=(like, like),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="residual_norm",
    )(parts, residual, weight)
    return total, normed


def _kernel(
    eps: float, parts_ref: Any, residual_ref: Any, weight_ref: Any, total_ref: Any, normed_ref: Any
) -> None:
    row = pl.program_id(0)
    num_parts, _, num_columns = parts_ref.shape
    columns = jnp.arange(pl.next_power_of_2(num_columns))
    is_real = columns < num_columns

    def load(place: Any) -> jax.Array:
        return plt.load(place, mask=is_real, other=0.0)

    parts = [load(parts_ref.at[part, row, columns]) for part in range(num_parts)]
    residual = load(residual_ref.at[row, columns])
    weight = load(weight_ref.at[columns])
    total = functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])
    total = total.astype(residual.dtype) + residual
    plt.store(total_ref.at[row, columns], total, mask=is_real)
    normed = normalised(total, weight, eps, num_columns)
    plt.store(normed_ref.at[row, columns], normed, mask=is_real)


def normalised(row: jax.Array, weight: jax.Array, eps: float, num_columns: int) -> jax.Array:
    """Norm of a row [..., D'] that is padded with zeros, with the reference's rounding."""
    row32 = row.astype(jnp.float32)
    mean = jnp.sum(row32 * row32, axis=-1, keepdims=True) / num_columns
    return (row32 * lax.rsqrt(mean + eps)).astype(row.dtype) * weight
