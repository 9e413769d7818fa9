"""Sum of what is due, residual added, normalised: one Pallas Triton kernel for few rows.

Grid (rows,): a program takes one row.
Limits: 16-bit floats, rows of up to 16,384 numbers; else NotImplementedError.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxtyping import Array, Float

MAX_COLUMNS = 16384
NUMBERS_OF_A_THREAD = 8

Rows = Float[Array, "T D"]


class NormKind(NamedTuple):
    """What is fixed of a norm at compile time."""

    kind: str
    eps: float
    offset: float
    has_weight: bool
    has_bias: bool

    @classmethod
    def of(cls, norm: Norm) -> "NormKind":
        """The kind of a norm."""
        has = norm.weight is not None, norm.bias is not None
        return cls(norm.kind, norm.eps, norm.offset, *has)

    @property
    def num_arrays(self) -> int:
        """Arrays that a kernel is given of it."""
        return self.has_weight + self.has_bias


class RowProblem(NamedTuple):
    """What is fixed at compile time of what happens to a row."""

    num_addends: int
    has_bias: bool
    norms: tuple[NormKind, ...]
    inner: NormKind | None
    scale: float

    @classmethod
    def of(
        cls, addends: Addends, norms: Sequence[Norm], inner: Norm | None, scale: float
    ) -> "RowProblem":
        """The problem of an op's operands."""
        return cls(
            num_addends=len(addends.arrays),
            has_bias=addends.bias is not None,
            norms=tuple(map(NormKind.of, norms)),
            inner=None if inner is None else NormKind.of(inner),
            scale=scale,
        )


def row_arrays(
    addends: Addends, residual: Rows, norms: Sequence[Norm], inner: Norm | None
) -> tuple[jax.Array, ...]:
    """The arrays of a row kernel, in the order of its references."""
    bias = () if addends.bias is None else (addends.bias,)
    all_norms = (*norms, *(() if inner is None else (inner,)))
    of_norms = (a for norm in all_norms for a in (norm.weight, norm.bias) if a is not None)
    return (*addends.arrays, *bias, residual, *of_norms)


def check_row_operands(
    addends: Addends, residual: Rows, norms: Sequence[Norm], inner: Norm | None
) -> None:
    """Raise if a row kernel cannot take them.

    Raises:
        NotImplementedError: If a dtype or a size is not served.
    """
    if residual.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"residual norm in Triton: {residual.dtype}, not of 16 bits")
    if residual.shape[1] > MAX_COLUMNS:
        raise NotImplementedError(f"residual norm in Triton: {residual.shape[1]} columns")
    for array in row_arrays(addends, residual, norms, inner)[len(addends.arrays) :]:
        if array.ndim != 1 and array is not residual:
            raise NotImplementedError(f"residual norm in Triton: an array {array.shape} for rows")


def residual_norm_triton(
    addends: Addends,
    residual: Rows,
    norms: tuple[Norm, ...],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    interpret: bool = False,
) -> tuple[Rows, tuple[Rows, ...]]:
    """Return the residual stream with what is due, and its norms, as ``residual_norm``.

    Args:
        addends: Added up and rounded to the residual's dtype.
        residual: Rows.
        norms: Of the stream.
        inner: Of the sum before it joins.
        scale: Factor on what joins.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If a dtype or a size is not served.
    """
    check_row_operands(addends, residual, norms, inner)
    problem = RowProblem.of(addends, norms, inner, scale)
    arrays = row_arrays(addends, residual, norms, inner)
    total, *normed = _launch(problem, residual.shape, residual.dtype, interpret, *arrays)
    return total, tuple(normed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # jitted: lowered once for all layers
def _launch(
    problem: RowProblem, shape: tuple[int, int], dtype: Any, interpret: bool, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    T, D = shape
    like = jax.ShapeDtypeStruct(shape, dtype)
    num_warps = max(1, min(16, pl.next_power_of_2(D) // (32 * NUMBERS_OF_A_THREAD)))
    outputs = pl.pallas_call(
        functools.partial(add_row, problem, pl.next_power_of_2(D), D, None),
        grid=(T,),
        out_shape=(like,) * (1 + len(problem.norms)),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="residual_norm",
    )(*arrays)
    return tuple(outputs)


def add_row(
    problem: RowProblem,
    padded: int,
    num_columns: int,
    over_gpus: Callable[[jax.Array, jax.Array], jax.Array] | None,
    *refs: Any,
) -> None:
    """What a program does with its row: sum of what is due, residual, norms.

    Args:
        problem: What is fixed.
        padded: Numbers of a row with what pads it, which is zero.
        num_columns: Numbers of a row.
        over_gpus: Makes of this GPU's numbers, and their places in a padded array, those of all;
            None for one GPU.
        refs: The arrays of ``row_arrays``, the stream and its norms.
    """
    row, columns = pl.program_id(0), jnp.arange(padded)
    is_real = columns < num_columns
    inputs = iter(refs)

    def load(place: Any) -> jax.Array:
        return plt.load(place, mask=is_real, other=0.0)

    # All loads are under way before the first is used.
    addends = [next(inputs) for _ in range(problem.num_addends)]
    parts = [load(ref.at[part, row, columns]) for ref in addends for part in range(ref.shape[0])]
    bias = load(next(inputs).at[columns]) if problem.has_bias else None
    residual = load(next(inputs).at[row, columns])
    kinds = (*problem.norms, *(() if problem.inner is None else (problem.inner,)))
    operands = [[load(next(inputs).at[columns]) for _ in range(k.num_arrays)] for k in kinds]
    total_ref, *normed_refs = inputs

    x = add_up(parts)
    if over_gpus is not None:
        x = over_gpus(x.astype(residual.dtype), row * padded + columns)
    if bias is not None:
        x = x.astype(jnp.float32) + bias.astype(jnp.float32)
    x = x.astype(residual.dtype)
    if problem.inner is not None:
        x = normalised(x, problem.inner, operands[-1], num_columns, is_real)
    if problem.scale != 1:
        x = x * jnp.asarray(problem.scale, x.dtype)
    total = x + residual
    plt.store(total_ref.at[row, columns], total, mask=is_real)
    for kind, arrays, ref in zip(problem.norms, operands, normed_refs, strict=False):
        normed = normalised(total, kind, arrays, num_columns, is_real)
        plt.store(ref.at[row, columns], normed, mask=is_real)


def add_up(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum of some arrays in float32."""
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])


def normalised(
    row: jax.Array,
    kind: NormKind,
    arrays: Sequence[jax.Array],
    num_columns: int,
    is_real: jax.Array | None = None,
) -> jax.Array:
    """Norm of a row [..., D'] that is padded with zeros, with the reference's rounding.

    Args:
        row: Its numbers.
        kind: Of the norm.
        arrays: Weight and bias, as far as it has them.
        num_columns: D, without the padding.
        is_real: Which of the numbers are no padding; None if all are.
    """
    operands = iter(arrays)
    weight = next(operands) if kind.has_weight else None
    bias = next(operands) if kind.has_bias else None
    row32 = row.astype(jnp.float32)
    if kind.kind == "layer":
        row32 = row32 - jnp.sum(row32, axis=-1, keepdims=True) / num_columns
        row32 = row32 if is_real is None else jnp.where(is_real, row32, 0.0)
    mean = jnp.sum(row32 * row32, axis=-1, keepdims=True) / num_columns
    normed = row32 * lax.rsqrt(mean + kind.eps)
    if kind.kind == "rms" and kind.offset == 0 and bias is None:
        normed = normed.astype(row.dtype)
        return normed if weight is None else normed * weight
    if weight is not None:
        normed = normed * (kind.offset + weight.astype(jnp.float32))
    if bias is not None:
        normed = normed + bias.astype(jnp.float32)
    return normed.astype(row.dtype)
