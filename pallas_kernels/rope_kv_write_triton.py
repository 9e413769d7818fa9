"""Head norms, rotary embedding and KV-cache write in one Pallas Triton kernel.

Grid (K, T): a program takes one KV head of one token: its G queries, its key and its value. The
caches are updated in place (aliased). A head lies in up to three pieces, both halves that are
rotated and what is not. Rounding is that of the reference, step by step.
Limits: bfloat16 or float16, one product; else NotImplementedError.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.residual_norm_triton import NormKind, add_up
from jaxengine.pallas_kernels.rope_kv_write_reference import CosSin
from jaxtyping import Array, Float, Int


class _HeadNorm(NamedTuple):
    """What is fixed of a head norm: its kind, and whether heads have weights of their own."""

    kind: NormKind
    is_by_head: bool


class _Problem(NamedTuple):
    """What is fixed at compile time."""

    group: int
    head_dim: int
    half: int  # of what is rotated; 0 for nothing
    block_size: int
    has_bias: bool
    q_norm: _HeadNorm | None
    k_norm: _HeadNorm | None

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First column and width of the pieces of a head."""
        pieces = [(0, self.half), (self.half, self.half)] if self.half else []
        tail = self.head_dim - 2 * self.half
        return [*pieces, (2 * self.half, tail)] if tail else pieces


def rope_kv_write_triton(
    addends: Addends,
    cos_sin: CosSin | None,
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``rope_kv_write``.

    Raises:
        NotImplementedError: If the dtype is not of 16 bits, the cache's differs, or there are
            several products.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or k_cache.dtype != dtype:
        raise NotImplementedError(f"dtypes {dtype} and {k_cache.dtype}: not one 16-bit type")
    if len(addends.arrays) != 1:
        raise NotImplementedError(f"{len(addends.arrays)} products: one is served")
    (parts,) = addends.arrays
    problem = _Problem(
        group=parts.shape[3] - 2,
        head_dim=parts.shape[4],
        half=0 if cos_sin is None else cos_sin[0].shape[1],
        block_size=k_cache.shape[2],
        has_bias=addends.bias is not None,
        q_norm=_head_norm(q_norm),
        k_norm=_head_norm(k_norm),
    )
    optional = (
        *(cos_sin or ()),
        *(array for norm in (q_norm, k_norm) if norm for array in (norm.weight, norm.bias)),
        addends.bias,
    )
    others = (array for array in optional if array is not None)
    return _launch(problem, interpret, slot_mapping, k_cache, v_cache, parts, *others)


def _head_norm(norm: Norm | None) -> _HeadNorm | None:
    if norm is None:
        return None
    return _HeadNorm(NormKind.of(norm), norm.weight is not None and norm.weight.ndim > 1)


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _launch(
    problem: _Problem,
    interpret: bool,
    slot_mapping: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    parts: jax.Array,
    *others: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, T, K, _, H = parts.shape
    queries = jax.ShapeDtypeStruct((T, K * problem.group, H), k_cache.dtype)
    caches = [jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype)] * 2
    outputs = pl.pallas_call(
        functools.partial(_kernel, problem),
        grid=(K, T),
        out_shape=(queries, *caches),
        input_output_aliases={1: 1, 2: 2},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rope_kv_write",
    )(slot_mapping, k_cache, v_cache, parts, *others)
    return outputs[0], outputs[1], outputs[2]


def _kernel(
    problem: _Problem,
    slot_ref: Any,
    _k_cache_ref: Any,
    _v_cache_ref: Any,
    parts_ref: Any,
    *rest: Any,
) -> None:
    *input_refs, q_out_ref, k_out_ref, v_out_ref = rest
    inputs = iter(input_refs)
    cos_sin_refs = [next(inputs) for _ in range(2 * (problem.half > 0))]
    q_norm_refs, k_norm_refs = (
        [next(inputs) for _ in range(0 if norm is None else norm.kind.num_arrays)]
        for norm in (problem.q_norm, problem.k_norm)
    )
    bias_ref = next(inputs) if problem.has_bias else None

    head, token = pl.program_id(0), pl.program_id(1)
    group = problem.group
    rows = jnp.arange(pl.next_power_of_2(group))
    heads = head * group + rows
    columns = [jnp.arange(pl.next_power_of_2(width)) for _, width in problem.pieces]
    is_real = [c < width for c, (_, width) in zip(columns, problem.pieces, strict=True)]
    targets = [c + first for c, (first, _) in zip(columns, problem.pieces, strict=True)]
    is_query = [(rows < group)[:, None] & mask[None, :] for mask in is_real]
    cos_sin = [
        plt.load(ref.at[token, columns[0]], mask=is_real[0], other=0.0) for ref in cos_sin_refs
    ]

    def load(row: Any, columns: jax.Array, mask: jax.Array) -> jax.Array:
        parts = [
            plt.load(parts_ref.at[part, token, head, row, columns], mask=mask, other=0.0)
            for part in range(parts_ref.shape[0])
        ]
        if bias_ref is not None:
            parts.append(plt.load(bias_ref.at[head, row, columns], mask=mask, other=0.0))
        return add_up(parts).astype(q_out_ref.dtype)

    def load_row(row: int) -> list[jax.Array]:
        return [load(row, t, mask) for t, mask in zip(targets, is_real, strict=True)]

    def load_queries() -> list[jax.Array]:
        return [
            load(rows[:, None], t[None, :], mask) for t, mask in zip(targets, is_query, strict=True)
        ]

    def load_norm(norm: _HeadNorm | None, refs: list[Any], row: Any) -> list[list[jax.Array]]:
        """Arrays of a norm, each in pieces."""
        if norm is None:
            return []
        if not norm.is_by_head:
            places = [[ref.at[t] for t in targets] for ref in refs]
            masks = is_real
        elif row is rows:
            places = [[ref.at[heads[:, None], t[None, :]] for t in targets] for ref in refs]
            masks = is_query
        else:
            places = [[ref.at[head, t] for t in targets] for ref in refs]
            masks = is_real
        return [
            [plt.load(p, mask=mask, other=0.0) for p, mask in zip(own, masks, strict=True)]
            for own in places
        ]

    def rotated(pieces: list[jax.Array]) -> list[jax.Array]:
        if not problem.half:
            return pieces
        dtype, (cos, sin) = pieces[0].dtype, cos_sin
        first, second = (piece.astype(jnp.float32) for piece in pieces[:2])
        low, high = first * cos - second * sin, second * cos + first * sin
        return [low.astype(dtype), high.astype(dtype), *pieces[2:]]

    def normed(pieces: list[jax.Array], norm: _HeadNorm | None, arrays: Any) -> list[jax.Array]:
        if norm is None:
            return pieces
        return _normalised(pieces, norm.kind, arrays, problem.head_dim, is_real)

    q_arrays = load_norm(problem.q_norm, q_norm_refs, rows)
    k_arrays = load_norm(problem.k_norm, k_norm_refs, head)
    queries = rotated(normed(load_queries(), problem.q_norm, q_arrays))
    slot = slot_ref[token]
    block, offset = lax.div(slot, problem.block_size), lax.rem(slot, problem.block_size)
    key = rotated(normed(load_row(group), problem.k_norm, k_arrays))
    value = load_row(group + 1)
    for piece, target in enumerate(targets):
        where = q_out_ref.at[token, heads[:, None], target[None, :]]
        plt.store(where, queries[piece], mask=is_query[piece])
        plt.store(k_out_ref.at[block, head, offset, target], key[piece], mask=is_real[piece])
        plt.store(v_out_ref.at[block, head, offset, target], value[piece], mask=is_real[piece])


def _normalised(
    pieces: Sequence[jax.Array],
    kind: NormKind,
    arrays: Sequence[Sequence[jax.Array]],
    num_columns: int,
    is_real: Sequence[jax.Array],
) -> list[jax.Array]:
    """Norm over the pieces of a head together, with the reference's rounding."""

    def total(values: Sequence[jax.Array]) -> jax.Array:
        # Halves of one size are added first: one reduction over the threads, not two.
        if len(values) > 1 and values[0].shape == values[1].shape:
            values = [values[0] + values[1], *values[2:]]
        sums = [jnp.sum(value, axis=-1, keepdims=True) for value in values]
        return functools.reduce(jnp.add, sums)

    dtype = pieces[0].dtype
    wide = [piece.astype(jnp.float32) for piece in pieces]
    if kind.kind == "layer":
        mean = total(wide) / num_columns
        wide = [jnp.where(mask, p - mean, 0.0) for p, mask in zip(wide, is_real, strict=True)]
    scale = lax.rsqrt(total([piece * piece for piece in wide]) / num_columns + kind.eps)
    operands = iter(arrays)
    weights = next(operands) if kind.has_weight else None
    biases = next(operands) if kind.has_bias else None
    out = []
    for number, piece in enumerate(wide):
        normed = piece * scale
        if kind.kind == "rms" and kind.offset == 0 and biases is None:
            normed = normed.astype(dtype)
            out.append(normed if weights is None else normed * weights[number])
            continue
        if weights is not None:
            normed = normed * (kind.offset + weights[number].astype(jnp.float32))
        if biases is not None:
            normed = normed + biases[number].astype(jnp.float32)
        out.append(normed.astype(dtype))
    return out
