"""Head norms, rotary embedding and KV-cache write in one Pallas Triton kernel.

Grid (K, T): a program takes one KV head of one token: its G queries, its key and its value; where
there are more queries than ``MAX_QUERIES``, a third axis of the grid takes the others. A head is
cut into pieces, the two halves that are rotated with each other and the rest. The caches are
updated in place (aliased). Rounding is that of the reference, step by step.
Limits: bfloat16 or float16; else NotImplementedError.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.norms import add_up, weighted
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.rope_kv_write_reference import CosSin
from jaxtyping import Array, Float, Int

MAX_QUERIES = 16  # of a program: a warp has no registers for more

Pieces = list[jax.Array]  # a head, or some heads, piece by piece
Load = Callable[[Any, tuple[Any, ...], "_Piece"], jax.Array]  # of a reference, at some rows


class _Problem(NamedTuple):
    """What is fixed at compile time."""

    group: int
    head_dim: int
    rotary_dim: int  # 0 for no rotation
    block_size: int

    @property
    def num_query_tiles(self) -> int:
        """Programs that share the queries of a KV head."""
        return pl.cdiv(self.group, MAX_QUERIES)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Start and length of each; the first two are rotated, if any are."""
        half, rest = self.rotary_dim // 2, self.head_dim - self.rotary_dim
        pieces = [(0, half), (half, half), (self.rotary_dim, rest)]
        return [piece for piece in pieces if piece[1]]


class _Piece(NamedTuple):
    """Columns of a head, padded to a power of two."""

    columns: jax.Array  # of the head
    is_real: jax.Array


def rope_kv_write_triton(
    addends: Addends,
    cos_sin: CosSin | None,
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``rope_kv_write``.

    Raises:
        NotImplementedError: If the dtype is not of 16 bits, or the cache's differs.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or k_cache.dtype != dtype:
        raise NotImplementedError(f"dtypes {dtype} and {k_cache.dtype}: not one 16-bit type")
    _, _, rows, head_dim = addends.shape
    problem = _Problem(
        group=rows - 2,
        head_dim=head_dim,
        rotary_dim=0 if cos_sin is None else 2 * cos_sin[0].shape[1],
        block_size=k_cache.shape[2],
    )
    return _launch(
        problem, interpret, addends, cos_sin, slot_mapping, k_cache, v_cache, q_norm, k_norm
    )


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _launch(
    problem: _Problem,
    interpret: bool,
    addends: Addends,
    cos_sin: CosSin | None,
    slot_mapping: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *norms: Norm | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    T, K, _, H = addends.shape
    queries = jax.ShapeDtypeStruct((T, K * problem.group, H), k_cache.dtype)
    caches = [jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype)] * 2
    tiles = problem.num_query_tiles
    first_cache = len(jax.tree.leaves((addends, cos_sin, slot_mapping)))
    outputs = pl.pallas_call(
        functools.partial(_kernel, problem),
        grid=(K, T) if tiles == 1 else (K, T, tiles),
        out_shape=(queries, *caches),
        input_output_aliases={first_cache: 1, first_cache + 1: 2},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rope_kv_write",
    )(addends, cos_sin, slot_mapping, k_cache, v_cache, *norms)
    return outputs[0], outputs[1], outputs[2]


def _kernel(
    problem: _Problem,
    addends: Addends,
    cos_sin: tuple[Any, Any] | None,
    slot_ref: Any,
    _k_cache_ref: Any,
    _v_cache_ref: Any,
    q_norm: Norm | None,
    k_norm: Norm | None,
    q_out_ref: Any,
    k_out_ref: Any,
    v_out_ref: Any,
) -> None:
    head, token = pl.program_id(0), pl.program_id(1)
    group, tiles = problem.group, problem.num_query_tiles
    pieces = _pieces(problem)
    members = jnp.arange(pl.next_power_of_2(min(group, MAX_QUERIES)))
    if tiles > 1:
        members = members + pl.program_id(2) * MAX_QUERIES
    is_member = members < group
    angles = None
    if cos_sin is not None:
        columns, is_real = pieces[0]
        angles = [plt.load(ref.at[token, columns], mask=is_real, other=0.0) for ref in cos_sin]

    def load_row(ref: Any, where: tuple[Any, ...], piece: _Piece) -> jax.Array:
        return plt.load(ref.at[(*where, piece.columns)], mask=piece.is_real, other=0.0)

    def load_queries(ref: Any, where: tuple[Any, ...], piece: _Piece) -> jax.Array:
        place = ref.at[(*where[:-1], where[-1][:, None], piece.columns[None, :])]
        mask = is_member[:, None] & piece.is_real[None, :]
        return plt.load(place, mask=mask, other=0.0)

    def summed(load: Load, row: Any) -> Pieces:
        sums = []
        for piece in pieces:
            parts = [
                load(array, (part, token, head, row), piece)
                for array in addends.arrays
                for part in range(array.shape[0])
            ]
            if addends.bias is not None:
                parts.append(load(addends.bias, (head, row), piece))
            sums.append(add_up(parts).astype(q_out_ref.dtype))
        return sums

    def finished(heads: Pieces, norm: Norm | None, load: Load, own_head: Any) -> Pieces:
        if norm is not None:

            def load_weight(ref: Any) -> Pieces:
                if len(ref.shape) == 1:  # one for all heads
                    return [load_row(ref, (), piece) for piece in pieces]
                return [load(ref, (own_head,), piece) for piece in pieces]

            heads = _normalised(problem, heads, norm, load_weight, pieces)
        return heads if angles is None else _rotated(heads, *angles)

    query_heads = head * group + members
    queries = finished(summed(load_queries, members), q_norm, load_queries, query_heads)
    for piece, values in zip(pieces, queries, strict=True):
        place = q_out_ref.at[token, query_heads[:, None], piece.columns[None, :]]
        plt.store(place, values, mask=is_member[:, None] & piece.is_real[None, :])

    def write_cache() -> None:
        slot = slot_ref[token]
        block, offset = lax.div(slot, problem.block_size), lax.rem(slot, problem.block_size)
        key = finished(summed(load_row, group), k_norm, load_row, head)
        value = summed(load_row, group + 1)
        for ref, row in ((k_out_ref, key), (v_out_ref, value)):
            for piece, values in zip(pieces, row, strict=True):
                place = ref.at[block, head, offset, piece.columns]
                plt.store(place, values, mask=piece.is_real)

    if tiles == 1:
        write_cache()
    else:
        pl.when(pl.program_id(2) == 0)(write_cache)


def _pieces(problem: _Problem) -> list[_Piece]:
    """What a head is cut into; pieces of equal length have the same mask."""
    pieces = []
    for start, length in problem.pieces:
        columns = jnp.arange(pl.next_power_of_2(length))
        pieces.append(_Piece(columns + start, columns < length))
    return pieces


def _normalised(
    problem: _Problem,
    heads: Pieces,
    norm: Norm,
    load_weight: Callable[[Any], Pieces],
    pieces: Sequence[_Piece],
) -> Pieces:
    def mean(values: Pieces) -> jax.Array:
        if problem.rotary_dim:  # the halves are of equal length: one sum for both
            values = [values[0] + values[1], *values[2:]]
        sums = [jnp.sum(value, axis=-1, keepdims=True) for value in values]
        return functools.reduce(jnp.add, sums) / problem.head_dim

    dtype = heads[0].dtype
    heads32 = [head.astype(jnp.float32) for head in heads]
    if norm.kind == "layer":
        middle = mean(heads32)
        heads32 = [
            jnp.where(piece.is_real, head - middle, 0.0)
            for head, piece in zip(heads32, pieces, strict=True)
        ]
    scale = lax.rsqrt(mean([head * head for head in heads32]) + norm.eps)
    refs: list[Any]
    structure: Any
    refs, structure = jax.tree.flatten(norm)
    loaded = zip(*(load_weight(ref) for ref in refs), strict=True) if refs else ((),) * len(heads)
    return [
        weighted(head * scale, structure.unflatten(weights), dtype)
        for head, weights in zip(heads32, loaded, strict=True)
    ]


def _rotated(heads: Pieces, cos: jax.Array, sin: jax.Array) -> Pieces:
    first, second, *rest = heads
    dtype = first.dtype
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    low, high = first * cos - second * sin, second * cos + first * sin
    return [low.astype(dtype), high.astype(dtype), *rest]
