"""Sum of products' parts, residual added, normalised: one Pallas Triton kernel for few rows.

Grid (rows,): a program takes one row.
Limits: 16-bit floats, rows of up to 16,384 numbers; else NotImplementedError.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.norms import add_up, joining, weighted
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxtyping import Array, Float

MAX_COLUMNS = 16384
NUMBERS_OF_A_THREAD = 8


def residual_norm_triton(
    addends: Addends,
    residual: Float[Array, "T D"],
    norms: tuple[Norm, ...],
    inner: Norm | None = None,
    *,
    scale: float = 1.0,
    interpret: bool = False,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """Return the residual stream after a sum, and its norms, as ``residual_norm`` on one GPU.

    Args:
        addends: To be added up; rounded to the residual's dtype after that.
        residual: Rows.
        norms: Of the stream.
        inner: Norm of the sum; None for none.
        scale: Factor on the sum.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If the dtype or the size is not served.
    """
    if residual.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"residual norm in Triton: {residual.dtype}, not of 16 bits")
    if residual.shape[1] > MAX_COLUMNS:
        raise NotImplementedError(f"residual norm in Triton: {residual.shape[1]} columns")
    return _launch(scale, interpret, addends, residual, norms, inner)


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _launch(
    scale: float,
    interpret: bool,
    addends: Addends,
    residual: jax.Array,
    norms: tuple[Norm, ...],
    inner: Norm | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    T, D = residual.shape
    like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    num_warps = max(1, min(16, pl.next_power_of_2(D) // (32 * NUMBERS_OF_A_THREAD)))
    total, normed = pl.pallas_call(
        functools.partial(_kernel, scale),
        grid=(T,),
        out_shape=(like, (like,) * len(norms)),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="residual_norm",
    )(addends, residual, norms, inner)
    return total, normed


def _kernel(scale: float, *refs: Any) -> None:
    padded = pl.next_power_of_2(refs[1].shape[1])
    add_row(scale, padded, None, *refs)


def add_row(
    scale: float,
    padded: int,
    over_gpus: Callable[[jax.Array, jax.Array], jax.Array] | None,
    addends: Addends,
    residual_ref: Any,
    norms: tuple[Norm, ...],
    inner: Norm | None,
    total_ref: Any,
    normed_refs: tuple[Any, ...],
) -> None:
    """What a program does with its row: sum of the parts, residual, norms.

    Args:
        scale: Factor on the sum.
        padded: Numbers of a row with what pads it, which is zero.
        over_gpus: Makes of this GPU's numbers, and their places in a padded array, the float32 sums
            of all; None for one GPU.
        addends: Of references, as all that follow: [S, T, D] and the bias [D].
        residual_ref: [T, D].
        norms: Of the stream, [D].
        inner: Of the sum, [D].
        total_ref: [T, D], an output.
        normed_refs: [T, D] each, outputs.
    """
    row, columns = pl.program_id(0), jnp.arange(padded)
    num_columns = residual_ref.shape[1]
    is_real = columns < num_columns

    def load(place: Any) -> jax.Array:
        return plt.load(place, mask=is_real, other=0.0)

    # All loads are under way before the first is used.
    parts = [
        load(array.at[part, row, columns])
        for array in addends.arrays
        for part in range(array.shape[0])
    ]
    residual = load(residual_ref.at[row, columns])
    norms, inner, bias = jax.tree.map(
        lambda ref: load(ref.at[columns]), (norms, inner, addends.bias)
    )

    def norm_of(x: jax.Array, norm: Norm) -> jax.Array:
        return normalised(x, norm, num_columns, is_real)

    x = add_up(parts)
    if over_gpus is not None:
        x = over_gpus(x.astype(residual.dtype), row * padded + columns)
    x = joining(
        x,
        residual.dtype,
        bias=bias,
        inner=None if inner is None else functools.partial(norm_of, norm=inner),
        scale=scale,
    )
    total = x + residual
    plt.store(total_ref.at[row, columns], total, mask=is_real)
    for norm, normed_ref in zip(norms, normed_refs, strict=True):
        plt.store(normed_ref.at[row, columns], norm_of(total, norm), mask=is_real)


def normalised(
    row: jax.Array, norm: Norm, num_columns: int, is_real: jax.Array | None
) -> jax.Array:
    """Norm of rows [..., D'] that are padded with zeros, with the reference's rounding.

    Args:
        row: Rows.
        norm: With a weight and a bias that broadcast against them.
        num_columns: D.
        is_real: [..., D'] which numbers are no padding; None if there is none.
    """
    row32 = row.astype(jnp.float32)
    if norm.kind == "layer":
        row32 = row32 - jnp.sum(row32, axis=-1, keepdims=True) / num_columns
        row32 = row32 if is_real is None else jnp.where(is_real, row32, 0.0)
    mean = jnp.sum(row32 * row32, axis=-1, keepdims=True) / num_columns
    return weighted(row32 * lax.rsqrt(mean + norm.eps), norm, row.dtype)
