"""Sum of a product's parts, residual added, normalised: one Pallas Triton kernel for few rows.

Grid (rows,): a program takes one row.
Limits: 16-bit floats, rows of up to 16,384 numbers; else NotImplementedError.
"""

import functools
from collections.abc import Callable, Sequence
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
    padded = pl.next_power_of_2(residual_ref.shape[1])
    add_row(eps, padded, None, parts_ref, residual_ref, weight_ref, total_ref, normed_ref)


def add_row(
    eps: float,
    padded: int,
    over_gpus: Callable[[jax.Array, jax.Array], jax.Array] | None,
    parts_ref: Any,
    residual_ref: Any,
    weight_ref: Any,
    total_ref: Any,
    normed_ref: Any,
) -> None:
    """What a program does with its row: sum of the parts, residual, norm.

    Args:
        eps: Of the norm.
        padded: Numbers of a row with what pads it, which is zero.
        over_gpus: Makes of this GPU's numbers, and their places in a padded array, those of all;
            None for one GPU.
        parts_ref: [S, T, D], and the other arrays as in ``residual_norm``.
        residual_ref: [T, D].
        weight_ref: [D].
        total_ref: [T, D], an output.
        normed_ref: [T, D], an output.
    """
    row, columns = pl.program_id(0), jnp.arange(padded)
    num_columns = residual_ref.shape[1]
    is_real = columns < num_columns

    def load(place: Any) -> jax.Array:
        return plt.load(place, mask=is_real, other=0.0)

    # All loads are under way before the first is used.
    parts = [load(parts_ref.at[part, row, columns]) for part in range(parts_ref.shape[0])]
    residual, weight = load(residual_ref.at[row, columns]), load(weight_ref.at[columns])
    x = add_up(parts).astype(residual.dtype)
    if over_gpus is not None:
        x = over_gpus(x, row * padded + columns)
    total = x + residual
    plt.store(total_ref.at[row, columns], total, mask=is_real)
    normed = normalised(total, weight, eps, num_columns)
    plt.store(normed_ref.at[row, columns], normed, mask=is_real)


def add_up(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum of some arrays in float32."""
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])


def normalised(row: jax.Array, weight: jax.Array, eps: float, num_columns: int) -> jax.Array:
    """Norm of a row [..., D'] that is padded with zeros, with the reference's rounding."""
    row32 = row.astype(jnp.float32)
    mean = jnp.sum(row32 * row32, axis=-1, keepdims=True) / num_columns
    return (row32 * lax.rsqrt(mean + eps)).astype(row.dtype) * weight
