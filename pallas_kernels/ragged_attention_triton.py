"""Ragged prefill attention over a paged KV cache in Pallas Triton.

Grid (tiles, K): a program takes up to ``tile_q`` query tokens of one row (see ragged_tiles.py) and
all G query heads of one KV head, packed as ``tile_q * G`` matrix rows so that a K/V tile is read
once for the group, and gathers K/V through the block table. Only tiles on the causal diagonal or
on the edge of the sliding window are masked.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum).
Limits: bfloat16 or float16, head_dim up to 256, group up to 128; else NotImplementedError.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.ragged_tiles import build_ragged_tiles, key_tiles
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

LOG2_E = math.log2(math.e)
# Starting maximum: finite, so that a row whose keys are all masked gives 0 and not NaN.
LOWEST = -1e30


class RaggedTritonConfig(NamedTuple):
    """Tile sizes of one program."""

    rows: int  # matrix rows: query tokens x query heads of the group
    tile_kv: int  # keys of one step of the loop
    num_warps: int
    num_stages: int  # depth of the K/V pipeline


class _Problem(NamedTuple):
    """What is fixed at compile time: the shapes and options of one kernel."""

    config: RaggedTritonConfig
    tile_q: int
    group: int
    padded_group: int
    head_dim: int
    padded_head_dim: int
    block_size: int
    options: AttentionOptions


def default_config(head_dim: int) -> RaggedTritonConfig:
    """Return tile sizes that compile for an H100 without register spills."""
    if head_dim <= 64:
        return RaggedTritonConfig(rows=128, tile_kv=64, num_warps=8, num_stages=3)
    if head_dim <= 128:  # 4 warps: 1.4 times the speed of 8 (816 against 1160 us, 8 x 2048)
        return RaggedTritonConfig(rows=128, tile_kv=64, num_warps=4, num_stages=3)
    return RaggedTritonConfig(rows=128, tile_kv=64, num_warps=8, num_stages=2)


def ragged_attention_triton(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    query_start_loc: Int[Array, " B+1"],
    num_decode_rows: Int[Array, ""],
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
    target: Target,
    config: RaggedTritonConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Attend causally from the query tokens of every row from ``num_decode_rows`` on.

    The last query token of a row sits at position ``seq_len - 1`` and the caches already hold this
    step's keys and values, so chunked prefill and a cached prefix are the same case.

    Args:
        q: Query tokens of all rows, packed.
        k_cache: Keys of one layer.
        v_cache: Values of one layer. Unwritten slots must be finite.
        block_tables: Block ids of each row; unused entries hold any valid id.
        seq_lens: KV length of each row, this step's tokens included; 0 for a padding row.
        query_start_loc: First packed token of each row, and the number of tokens at the end.
        num_decode_rows: The first rows, left to the decode kernel.
        alibi_slopes: ``slope[n] * (key position - query position)`` is added to the scores.
        sinks: Of each query head, a score that takes its share of the softmax and has no value.
        options: Scale, window and soft cap.
        target: The GPU.
        config: Tile sizes, None for the default of the head_dim.
        interpret: Run on the CPU, slowly, for tests.

    Returns:
        The attention output. Tokens of decode rows and padding tokens hold zeros.

    Raises:
        NotImplementedError: For a dtype or shape that this kernel does not serve.
    """
    del target  # tiles are the same for all
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    config = config or default_config(head_dim)
    padded_group = pl.next_power_of_2(num_heads // num_kv_heads)
    _check_supported(q, k_cache, v_cache, padded_group, config)
    problem = _Problem(
        config=config,
        tile_q=config.rows // padded_group,
        group=num_heads // num_kv_heads,
        padded_group=padded_group,
        head_dim=head_dim,
        padded_head_dim=max(16, pl.next_power_of_2(head_dim)),
        block_size=block_size,
        options=options,
    )
    tiles = build_ragged_tiles(
        query_start_loc, seq_lens, num_decode_rows, num_tokens=num_tokens, tile_q=problem.tile_q
    )
    lists = (tiles.row, tiles.token, tiles.num_tokens, tiles.position)
    per_head = [None if a is None else a.astype(jnp.float32) for a in (alibi_slopes, sinks)]
    return _call(problem, interpret, *lists, block_tables, q, k_cache, v_cache, *per_head)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(problem: _Problem, interpret: bool, *operands: Any) -> jax.Array:
    """Run the kernel. Jitted so that jax lowers it once for all layers."""
    q, k_cache = operands[5:7]
    return pl.pallas_call(
        functools.partial(_kernel, problem),
        grid=(operands[0].shape[0], k_cache.shape[1]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(
            num_warps=problem.config.num_warps, num_stages=problem.config.num_stages
        ),
        interpret=interpret,
        name="ragged_attention_triton",
    )(*operands)


def _check_supported(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    padded_group: int,
    config: RaggedTritonConfig,
) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"ragged Triton attention: dtype {q.dtype}, not bf16 or fp16")
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise NotImplementedError(
            f"ragged Triton attention: cache is {k_cache.dtype}/{v_cache.dtype}, query {q.dtype}"
        )
    if q.shape[-1] > 256:
        raise NotImplementedError(f"ragged Triton attention: head_dim {q.shape[-1]} > 256")
    if q.shape[1] % k_cache.shape[1] or padded_group > config.rows:
        raise NotImplementedError(
            f"ragged Triton attention: {q.shape[1]} query heads, {k_cache.shape[1]} KV heads"
        )


def _kernel(problem: _Problem, *refs: Any) -> None:
    row_ref, token_ref, num_tokens_ref, position_ref, block_tables_ref, q_ref = refs[:6]
    k_ref, v_ref, slopes_ref, sinks_ref, out_ref = refs[6:]
    window = problem.options.sliding_window
    tile, kv_head = pl.program_id(0), pl.program_id(1)
    num_tokens = num_tokens_ref[tile]

    @pl.when(num_tokens > 0)
    def _attend() -> None:
        row, token, position = row_ref[tile], token_ref[tile], position_ref[tile]
        group, columns = problem.padded_group, problem.padded_head_dim
        matrix_row = jnp.arange(problem.config.rows, dtype=jnp.int32)
        query, member = lax.div(matrix_row, group), lax.rem(matrix_row, group)
        head = kv_head * problem.group + member
        column = jnp.arange(columns, dtype=jnp.int32)
        in_head = column < problem.head_dim
        is_query = (query < num_tokens) & (member < problem.group)
        query_mask = is_query[:, None] & in_head[None, :]
        query_index = (token + query)[:, None], head[:, None], column[None, :]
        q = plt.load(q_ref.at[query_index], mask=query_mask, other=0)
        slope = None
        if slopes_ref is not None:
            slope = plt.load(slopes_ref.at[head], mask=is_query, other=0.0) * LOG2_E
        query_position = position + query

        def load_keys(ref: Any, key: jax.Array) -> jax.Array:
            block = lax.div(key, problem.block_size)
            block = jnp.minimum(block, block_tables_ref.shape[1] - 1)  # the last tile may overhang
            block_id = plt.load(block_tables_ref.at[jnp.full_like(block, row), block])
            index = (
                block_id[:, None],
                jnp.full_like(block_id, kv_head)[:, None],
                lax.rem(key, problem.block_size)[:, None],
                column[None, :],
            )
            if columns == problem.head_dim:
                return plt.load(ref.at[index])
            mask = jnp.broadcast_to(in_head[None, :], (key.shape[0], columns))
            return plt.load(ref.at[index], mask=mask, other=0)

        def step(i: jax.Array, carry: tuple[jax.Array, ...], *, masked: bool) -> Any:
            acc, maximum, total = carry
            key = i * problem.config.tile_kv + jnp.arange(problem.config.tile_kv, dtype=jnp.int32)
            k = load_keys(k_ref, key)
            scores = base2_scores(
                jnp.dot(q, k.T, preferred_element_type=jnp.float32), problem.options
            )
            distance = query_position[:, None] - key[None, :]
            if slope is not None:
                scores -= slope[:, None] * distance.astype(jnp.float32)
            if masked:
                visible = distance >= 0
                if window is not None:
                    visible &= distance < window
                scores = jnp.where(visible, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            p = jnp.exp2(scores - new_maximum[:, None])
            v = load_keys(v_ref, key)
            acc = acc * decay[:, None] + jnp.dot(
                p.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return acc, new_maximum, total * decay + jnp.sum(p, axis=1)

        first, first_full, last_full, last = key_tiles(
            position, num_tokens, problem.config.tile_kv, window
        )
        maximum = jnp.full((problem.config.rows,), LOWEST, jnp.float32)
        total = jnp.zeros((problem.config.rows,), jnp.float32)
        if sinks_ref is not None:  # as a key without a value
            maximum = plt.load(sinks_ref.at[head], mask=is_query, other=0.0) * LOG2_E
            total = total + 1
        carry = (jnp.zeros((problem.config.rows, columns), jnp.float32), maximum, total)
        if window is None:
            full_step = functools.partial(step, masked=False)
            carry = lax.fori_loop(first_full, last_full, full_step, carry)
            first = last_full
        # With a window all tiles are masked: a third loop makes ptxas serialise the products.
        acc, _, total = lax.fori_loop(first, last, functools.partial(step, masked=True), carry)
        out = acc / jnp.maximum(total, 1e-30)[:, None]
        plt.store(out_ref.at[query_index], out.astype(out_ref.dtype), mask=query_mask)


def base2_scores(dots: jax.Array, options: AttentionOptions) -> jax.Array:
    """Scale (and cap) the dot products, in units whose exponential is ``exp2``."""
    cap, scale = options.logits_soft_cap, options.scale
    if cap is None:
        return dots * (scale * LOG2_E)
    # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends, and cheaper than the library's.
    exponential = jnp.exp2(dots * (2 * scale / cap * LOG2_E))
    return (cap * LOG2_E) * (1 - 2 / (1 + exponential))
