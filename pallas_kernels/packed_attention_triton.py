"""Attention of packed sequences without a cache in Pallas Triton.

Grid (tiles, K): a program takes up to ``tile_q`` tokens of one row (ragged_tiles.py) and all G
query heads of one KV head, packed as ``tile_q * G`` matrix rows, and walks the keys of the row,
which lie one after the other. Only key tiles at the end of the row, on the causal diagonal or
within a window's reach are masked.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum).
Limits: bfloat16 or float16, head_dim up to 128, group up to 128; else NotImplementedError.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.ragged_attention_triton import (
    LOWEST,
    RaggedTritonConfig,
    base2_scores,
    default_config,
)
from jaxengine.pallas_kernels.ragged_tiles import build_ragged_tiles
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int


class _Problem(NamedTuple):
    """What is fixed at compile time."""

    config: RaggedTritonConfig
    group: int
    padded_group: int
    head_dim: int
    padded_head_dim: int
    options: AttentionOptions
    is_causal: bool


class _KeyTiles(NamedTuple):
    """Key tiles of a query tile: [first, last), without a mask from ``first`` to ``last_full``."""

    first: jax.Array
    last_full: jax.Array
    last: jax.Array


def packed_attention_triton(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    query_start_loc: Int[Array, " B_plus_1"],
    *,
    options: AttentionOptions,
    is_causal: bool,
    target: Target,
    config: RaggedTritonConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """As ``packed_attention``.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        query_start_loc: First token of each row, and the end of the last.
        options: Scale, soft cap and window.
        is_causal: Whether a token sees none after it.
        target: The GPU.
        config: Tile sizes, None for the default of the head_dim.
        interpret: Run on the CPU, slowly, for tests.

    Raises:
        NotImplementedError: For a dtype or shape that this kernel does not serve.
    """
    del target  # tiles are the same for all
    num_tokens, num_heads, head_dim = q.shape
    config = config or default_config(head_dim)
    group = num_heads // k.shape[1]
    padded_group = pl.next_power_of_2(group)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"packed Triton attention: dtype {q.dtype}, not bf16 or fp16")
    if head_dim > 128 or padded_group > config.rows:
        raise NotImplementedError(f"packed Triton attention: head_dim {head_dim}, group {group}")
    problem = _Problem(
        config=config,
        group=group,
        padded_group=padded_group,
        head_dim=head_dim,
        padded_head_dim=max(16, pl.next_power_of_2(head_dim)),
        options=options,
        is_causal=is_causal,
    )
    lens = jnp.diff(query_start_loc)
    tiles = build_ragged_tiles(
        query_start_loc,
        lens,
        jnp.int32(0),
        num_tokens=num_tokens,
        tile_q=config.rows // padded_group,
    )
    lists = (tiles.row, tiles.token, tiles.num_tokens, tiles.position)
    return _call(problem, interpret, *lists, lens, q, k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _call(problem: _Problem, interpret: bool, *operands: jax.Array) -> jax.Array:
    q, k = operands[5:7]
    return pl.pallas_call(
        functools.partial(_kernel, problem),
        grid=(operands[0].shape[0], k.shape[1]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(
            num_warps=problem.config.num_warps, num_stages=problem.config.num_stages
        ),
        interpret=interpret,
        name="packed_attention",
    )(*operands)


def _key_tiles(
    problem: _Problem, position: jax.Array, num_tokens: jax.Array, length: jax.Array
) -> _KeyTiles:
    width = jnp.int32(problem.config.tile_kv)
    window = problem.options.sliding_window
    first, end = jnp.int32(0), length
    if problem.is_causal:
        end = jnp.minimum(end, position + num_tokens)
    if window is not None:
        first = lax.div(jnp.maximum(position - (window - 1), 0), width)
        end = jnp.minimum(end, position + num_tokens - 1 + window)
        last_full = first  # all tiles are masked: another loop costs more than masks
    else:
        last_full = lax.div(jnp.minimum(end, position + 1) if problem.is_causal else end, width)
    return _KeyTiles(first, last_full, lax.div(end + (width - 1), width))


def _kernel(
    problem: _Problem,
    row_ref: Any,
    token_ref: Any,
    num_tokens_ref: Any,
    position_ref: Any,
    lens_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
) -> None:
    tile, kv_head = pl.program_id(0), pl.program_id(1)
    num_tokens = num_tokens_ref[tile]

    @pl.when(num_tokens > 0)
    def _attend() -> None:
        token, position = token_ref[tile], position_ref[tile]
        # A tile of padding has a position before its row, and no keys.
        length = jnp.where(position < 0, 0, lens_ref[row_ref[tile]])
        start = token - position
        matrix_row = jnp.arange(problem.config.rows, dtype=jnp.int32)
        query = lax.div(matrix_row, problem.padded_group)
        member = lax.rem(matrix_row, problem.padded_group)
        head = kv_head * problem.group + member
        column = jnp.arange(problem.padded_head_dim, dtype=jnp.int32)
        in_head = column < problem.head_dim
        is_query = (query < num_tokens) & (member < problem.group)
        query_mask = is_query[:, None] & in_head[None, :]
        query_index = (token + query)[:, None], head[:, None], column[None, :]
        q = plt.load(q_ref.at[query_index], mask=query_mask, other=0)
        query_position = position + query

        def load_keys(ref: Any, key: jax.Array, masked: bool) -> jax.Array:
            place = ref.at[(start + key)[:, None], jnp.full_like(key, kv_head)[:, None],
                           column[None, :]]  # fmt: skip
            if not masked and problem.padded_head_dim == problem.head_dim:
                return plt.load(place)
            return plt.load(place, mask=(key < length)[:, None] & in_head[None, :], other=0)

        def step(i: jax.Array, carry: tuple[jax.Array, ...], *, masked: bool) -> Any:
            acc, maximum, total = carry
            key = i * problem.config.tile_kv + jnp.arange(problem.config.tile_kv, dtype=jnp.int32)
            k = load_keys(k_ref, key, masked)
            dots = jnp.dot(q, k.T, preferred_element_type=jnp.float32)
            scores = base2_scores(dots, problem.options)
            if masked:
                scores = jnp.where(_visible(problem, query_position, key, length), scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            p = jnp.exp2(scores - new_maximum[:, None])
            v = load_keys(v_ref, key, masked)
            weighted = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return acc * decay[:, None] + weighted, new_maximum, total * decay + jnp.sum(p, axis=1)

        tiles = _key_tiles(problem, position, num_tokens, length)
        carry = (
            jnp.zeros((problem.config.rows, problem.padded_head_dim), jnp.float32),
            jnp.full((problem.config.rows,), LOWEST, jnp.float32),
            jnp.zeros((problem.config.rows,), jnp.float32),
        )
        if problem.options.sliding_window is None:
            whole = functools.partial(step, masked=False)
            carry = lax.fori_loop(tiles.first, tiles.last_full, whole, carry)
        acc, _, total = lax.fori_loop(
            tiles.last_full, tiles.last, functools.partial(step, masked=True), carry
        )
        out = acc / jnp.maximum(total, 1e-30)[:, None]
        plt.store(out_ref.at[query_index], out.astype(out_ref.dtype), mask=query_mask)


def _visible(
    problem: _Problem, query_position: jax.Array, key: jax.Array, length: jax.Array
) -> jax.Array:
    distance = query_position[:, None] - key[None, :]
    visible = jnp.broadcast_to((key < length)[None, :], distance.shape)
    if problem.is_causal:
        visible &= distance >= 0
    if problem.options.sliding_window is not None:
        visible &= jnp.abs(distance) < problem.options.sliding_window
    return visible
