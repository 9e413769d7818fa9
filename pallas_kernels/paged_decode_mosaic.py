"""Paged attention for decode in Pallas Mosaic GPU, for Hopper: one query token a row.

Grid (splits, K): a block of threads reduces one KV head over one stretch of one row. A producer
warpgroup copies the stretch, one TMA a cache block, into a ring of tiles in shared memory. For a
consumer warpgroup both products are transposed, scores [tile_kv, G] = K q and out [H, G] = V^T p:
wgmma needs 64 rows, which the keys and the head have and the G query heads have not. So little
is kept in registers and in shared memory that several blocks of threads fit in an SM: while one
starts or ends, the others keep the memory busy. A row in one stretch is written out at once; the
stretches of the others are merged by a second kernel, in float32.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum), in base 2.
Limits: bfloat16 or float16; head_dim 64, 128 or 256; group up to 64; tile_kv a multiple of 64; a
block_size that divides tile_kv or is a multiple of it; jax 0.11 or newer; else
NotImplementedError.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxengine.pallas_kernels.decode_splits import (
    DecodeMerges,
    DecodeSplits,
    split_merges,
    split_rows,
)
from jaxengine.pallas_kernels.tiles import DecodeConfig, mosaic_decode_config, num_extra_splits
from jaxtyping import Array, Float, Int

plgpu: Any = mosaic_gpu  # its signatures differ between versions of jax

LOG2_E = math.log2(math.e)
# Starting maximum: finite, so that a tile whose keys are all masked gives 0 and not NaN.
LOWEST = -1e30
MAX_GROUP = 64
CONSUMER, PRODUCER = 0, 1


class _Problem(NamedTuple):
    """What is fixed at compile time: the shapes and options of one kernel."""

    config: DecodeConfig
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    table_width: int
    dtype: Any
    scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    has_alibi: bool
    interpret: Any

    @property
    def padded_group(self) -> int:
        """The N of wgmma, and shared memory, come in steps of 8."""
        return -(-self.group // 8) * 8

    @property
    def copies_per_tile(self) -> int:
        return max(1, self.config.tile_kv // self.block_size)

    @property
    def rows_per_copy(self) -> int:
        return min(self.config.tile_kv, self.block_size)


def paged_decode_mosaic(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    *,
    scale: float,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    config: DecodeConfig | None = None,
    interpret: Any = None,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row, the last of its sequence; rows of length 0 give 0.

    Args:
        q: Query of each row.
        k_cache: Keys of one layer. Finite everywhere, as ``v_cache``.
        v_cache: Values, laid out like ``k_cache``.
        block_tables: Physical block ids of each row; unused entries hold any valid id.
        seq_lens: KV length of each row; 0 for a padding row.
        scale: Factor on q . k.
        sliding_window: Only the last ``sliding_window`` keys are seen.
        logits_soft_cap: Scores become cap * tanh(score / cap), after ``scale``.
        alibi_slopes: slope[n] * (key position - query position) is added to the scores.
        config: Tile sizes; None takes the measured ones.
        interpret: ``plgpu.InterpretGPUParams`` to run on the CPU, slowly, for tests.

    Raises:
        NotImplementedError: If the dtype, a shape or this version of jax is not served.
    """
    B, N, H = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    config = config or mosaic_decode_config(H, B)
    _check_supported(q, num_kv_heads, block_size, config)
    problem = _Problem(
        config=config,
        num_kv_heads=num_kv_heads,
        group=N // num_kv_heads,
        head_dim=H,
        block_size=block_size,
        table_width=block_tables.shape[1],
        dtype=q.dtype,
        scale=scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        has_alibi=alibi_slopes is not None,
        interpret=interpret,
    )
    num_extra = num_extra_splits(config, num_kv_heads)
    splits = split_rows(
        seq_lens,
        num_extra=num_extra,
        tile_kv=config.tile_kv,
        min_split_tokens=config.min_split_tokens,
        sliding_window=sliding_window,
    )
    slopes = None
    if alibi_slopes is not None:
        grouped = alibi_slopes.astype(jnp.float32).reshape(num_kv_heads, -1)
        slopes = jnp.pad(grouped, ((0, 0), (0, problem.padded_group - problem.group)))
    merges = split_merges(splits, max_merges=min(B, num_extra))
    return _attend(problem, splits, merges, seq_lens, block_tables, slopes, q, k_cache, v_cache)


def _check_supported(
    q: jax.Array, num_kv_heads: int, block_size: int, config: DecodeConfig
) -> None:
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"Mosaic decode needs jax 0.11, not {jax.__version__}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"Mosaic decode takes bfloat16 or float16, not {q.dtype}")
    if q.shape[2] not in (64, 128, 256):
        raise NotImplementedError(f"Mosaic decode: head_dim {q.shape[2]} is not 64, 128 or 256")
    if q.shape[1] // num_kv_heads > MAX_GROUP:
        raise NotImplementedError(
            f"Mosaic decode: group {q.shape[1] // num_kv_heads} > {MAX_GROUP}"
        )
    if config.tile_kv % 64:
        raise NotImplementedError(f"Mosaic decode: tile_kv {config.tile_kv} is no multiple of 64")
    if config.tile_kv % block_size and block_size % config.tile_kv:
        raise NotImplementedError(f"Mosaic decode: block_size {block_size}, tile {config.tile_kv}")


# One jitted function: the layers of a model share one trace and one compiled kernel.
@functools.partial(jax.jit, static_argnums=0)
def _attend(
    problem: _Problem,
    splits: DecodeSplits,
    merges: DecodeMerges,
    seq_lens: jax.Array,
    block_tables: jax.Array,
    slopes: jax.Array | None,
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
) -> jax.Array:
    B, N, H = q.shape
    num_splits, num_merges = splits.row.shape[0], merges.row.shape[0]
    heads = (num_splits, problem.num_kv_heads)
    reduce = _kernel(
        functools.partial(_reduce_split, problem),
        problem,
        name="paged_decode",
        out_type=(
            jax.ShapeDtypeStruct((B, N, H), q.dtype),
            jax.ShapeDtypeStruct((*heads, H, problem.padded_group), jnp.float32),
            jax.ShapeDtypeStruct((*heads, problem.padded_group), jnp.float32),
        ),
        scratch_types=_scratch_types(problem),
        grid=(num_splits, problem.num_kv_heads),
        num_threads=2,
    )
    # XLA fuses the padding into whatever computes q.
    grouped_q = q.reshape(B, problem.num_kv_heads, problem.group, H)
    no_padding = (0, 0)
    rows_added = (0, problem.padded_group - problem.group)
    grouped_q = jnp.pad(grouped_q, (no_padding, no_padding, rows_added, no_padding))
    out, partial_out, partial_lse = reduce(
        *splits,
        seq_lens.astype(jnp.int32),
        block_tables,
        *([] if slopes is None else [slopes]),
        grouped_q,
        k_cache,
        v_cache,
    )
    merge = _kernel(
        functools.partial(_merge_splits, problem),
        problem,
        name="paged_decode_merge",
        scratch_types=[plgpu.SMEM((problem.padded_group, H), q.dtype)],
        grid=(num_merges, problem.num_kv_heads),
        num_threads=1,
    )
    merged = jax.new_ref(out)
    merge(*merges, partial_out, partial_lse, merged)
    return jax.freeze(merged)


def _kernel(body: Any, problem: _Problem, *, name: str, **kwargs: Any) -> Any:
    if problem.interpret:
        kwargs["interpret"] = problem.interpret
    return plgpu.kernel(
        body,
        grid_names=("split", "head"),
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **kwargs,
    )


def _scratch_types(problem: _Problem) -> list[Any]:
    config, group, H = problem.config, problem.padded_group, problem.head_dim
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    ring = plgpu.SMEM((config.num_stages, config.tile_kv, H), problem.dtype, transforms=tiled)
    full = plgpu.Barrier(num_arrivals=problem.copies_per_tile, num_barriers=config.num_stages)
    return [
        plgpu.SMEM((group, H), problem.dtype, transforms=tiled),
        ring,
        ring,
        plgpu.SMEM((group, config.tile_kv), problem.dtype, transforms=tiled),
        plgpu.RefUnion(plgpu.SMEM((group, H), problem.dtype), plgpu.SMEM((H, group), jnp.float32)),
        plgpu.Barrier(),
        full,
        full,
        plgpu.Barrier(num_barriers=config.num_stages),
    ]


def _reduce_split(problem: _Problem, *refs: Any) -> None:
    arguments = list(refs)
    if not problem.has_alibi:
        arguments.insert(7, None)
    row_ref, start_ref, stop_ref, first_split_ref, end_split_ref = arguments[:5]
    seq_lens_ref, tables, slopes_ref = arguments[5:8]
    q_ref, k_ref, v_ref, out_ref, partial_out_ref, partial_lse_ref = arguments[8:14]
    q_s, k_s, v_s, p_s, (out_s, partial_s), q_full, k_full, v_full, free = arguments[14:]
    tile_kv, num_stages = problem.config.tile_kv, problem.config.num_stages
    H, group = problem.head_dim, problem.padded_group
    split, head = lax.axis_index("split"), lax.axis_index("head")
    warpgroup = lax.axis_index("warpgroup")
    row, start, stop = row_ref[split], start_ref[split], stop_ref[split]
    is_used = row >= 0
    row = jnp.maximum(row, 0)
    num_tiles = jnp.where(is_used, lax.div(stop - start + (tile_kv - 1), tile_kv), 0)

    def copy_tile(cache: Any, ring: Any, full: Any, tile: jax.Array, stage: jax.Array) -> None:
        first = start + tile * tile_kv
        for copy in range(problem.copies_per_tile):
            position = first + copy * problem.rows_per_copy
            column = jnp.minimum(lax.div(position, problem.block_size), problem.table_width - 1)
            source = cache.at[tables[row, column], head]
            if problem.block_size > tile_kv:
                offset = pl.multiple_of(lax.rem(position, problem.block_size), tile_kv)
                source = source.at[pl.ds(offset, tile_kv)]
            target = ring.at[stage, pl.ds(copy * problem.rows_per_copy, problem.rows_per_copy)]
            plgpu.copy_gmem_to_smem(source, target, full.at[stage])

    @pl.when(is_used & (warpgroup == PRODUCER))
    def _produce() -> None:
        def copy_step(tile: jax.Array, _: None) -> None:
            stage = lax.rem(tile, num_stages)

            @pl.when(tile >= num_stages)
            def _wait() -> None:
                plgpu.barrier_wait(free.at[stage])

            copy_tile(k_ref, k_s, k_full, tile, stage)
            copy_tile(v_ref, v_s, v_full, tile, stage)

        lax.fori_loop(0, num_tiles, copy_step, None)

        def drain(tile: jax.Array, _: None) -> None:
            plgpu.barrier_wait(free.at[lax.rem(tile, num_stages)])

        lax.fori_loop(jnp.maximum(num_tiles - num_stages, 0), num_tiles, drain, None)

    @pl.when(is_used & (warpgroup == CONSUMER))
    def _consume() -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_s, q_full)
        position = seq_lens_ref[row] - 1
        layout = plgpu.Layout.WGMMA
        of_keys, of_heads = layout.reduce(1), layout.reduce(0)
        slopes = None
        if problem.has_alibi:
            slopes = plgpu.load(slopes_ref.at[head], layout=of_heads, optimized=False)
        plgpu.barrier_wait(q_full)

        def reduce_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, maximum, total = carry
            stage = lax.rem(tile, num_stages)
            keys = plgpu.broadcasted_iota(jnp.int32, (tile_kv,), 0, layout=of_keys)
            keys = keys + (start + tile * tile_kv)
            visible = keys < stop
            if problem.sliding_window is not None:
                visible &= keys > position - problem.sliding_window

            plgpu.barrier_wait(k_full.at[stage])
            scores = _multiply((tile_kv, group), k_s.at[stage], q_s.transpose((1, 0)))
            scores = _biased(problem, scores, keys - position, slopes)
            scores = jnp.where(lax.broadcast_in_dim(visible, scores.shape, [0]), scores, LOWEST)
            new_maximum = jnp.maximum(maximum, scores.max(axis=0))
            decay = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [1]))
            # Added up over the keys of a tile only at the end: that crosses the warps.
            total = total * lax.broadcast_in_dim(decay, total.shape, [1]) + weights
            _store_transposed(p_s, weights.astype(problem.dtype))
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1])

            plgpu.barrier_wait(v_full.at[stage])
            values, p = v_s.at[stage].transpose((1, 0)), p_s.transpose((1, 0))
            if problem.interpret:  # it cannot start an accumulator at a value
                acc = acc + _multiply(acc.shape, values, p)
            else:
                acc = _multiply_add(acc, values, p)
            plgpu.barrier_arrive(free.at[stage])
            return acc, new_maximum, total

        start_values = (
            plgpu.layout_cast(jnp.zeros((H, group), jnp.float32), layout),
            plgpu.layout_cast(jnp.full((group,), LOWEST, jnp.float32), of_heads),
            plgpu.layout_cast(jnp.zeros((tile_kv, group), jnp.float32), layout),
        )
        acc, maximum, total = lax.fori_loop(0, num_tiles, reduce_tile, start_values)
        total = total.sum(axis=0)
        total = jnp.where(total > 0, total, 1.0)
        out = acc / lax.broadcast_in_dim(total, acc.shape, [1])
        is_whole_row = end_split_ref[split] - first_split_ref[split] == 1

        @pl.when(is_whole_row)
        def _store() -> None:
            _store_transposed(out_s, out.astype(problem.dtype))
            plgpu.copy_smem_to_gmem(
                out_s.at[pl.ds(0, problem.group)],
                out_ref.at[row, pl.ds(head * problem.group, problem.group)],
            )
            plgpu.wait_smem_to_gmem(0)

        @pl.when(jnp.logical_not(is_whole_row))
        def _store_partial() -> None:
            partial_s[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(partial_s, partial_out_ref.at[split, head])
            partial_lse_ref[split, head] = maximum + jnp.log2(total)
            plgpu.wait_smem_to_gmem(0)


def _multiply(shape: tuple[int, ...], a: Any, b: Any) -> jax.Array:
    def accumulate(product: Any) -> jax.Array:
        plgpu.wgmma(product, a, b)
        value: jax.Array = product[...]
        return value

    # Reading the accumulator does not depend on the wait for it: the barrier keeps it in place.
    product: jax.Array = pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))
    return lax.optimization_barrier(product)


def _multiply_add(acc: jax.Array, a: Any, b: Any) -> jax.Array:
    def accumulate(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, a, b)

    total: jax.Array = pl.run_state(accumulate)(plgpu.ACC.init(acc))
    return lax.optimization_barrier(total)


def _store_transposed(target: Any, values: jax.Array) -> None:
    """Write registers [X, G] to shared memory [G, X], visible to the asynchronous units."""
    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
    target.transpose((1, 0))[...] = values
    plgpu.commit_smem()


def _biased(
    problem: _Problem, scores: jax.Array, distance: jax.Array, slopes: jax.Array | None
) -> jax.Array:
    """Scores [tile_kv, G] times log2(e), ready for exp2."""
    cap = problem.logits_soft_cap
    if cap is None:
        scores = scores * (problem.scale * LOG2_E)
    else:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): the hardware's approximate tanh is off by 5e-4.
        grown = jnp.exp2(scores * (2 * problem.scale / cap * LOG2_E))
        scores = (1.0 - 2.0 / (grown + 1.0)) * (cap * LOG2_E)
    if slopes is not None:
        steepness = lax.broadcast_in_dim(slopes * LOG2_E, scores.shape, [1])
        scores += steepness * lax.broadcast_in_dim(distance.astype(jnp.float32), scores.shape, [0])
    return scores


def _merge_splits(
    problem: _Problem,
    merged_row_ref: Any,
    first_split_ref: Any,
    end_split_ref: Any,
    partial_out_ref: Any,
    partial_lse_ref: Any,
    out_ref: Any,
    out_s: Any,
) -> None:
    merge, head = lax.axis_index("split"), lax.axis_index("head")
    row = merged_row_ref[merge]
    shape = (problem.head_dim, problem.padded_group)
    layout = plgpu.Layout.WGMMA
    of_heads = layout.reduce(0)

    @pl.when(row >= 0)
    def _merge_row() -> None:
        def add_split(split: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, maximum, total = carry
            source = partial_out_ref.at[split, head]
            part = plgpu.load(source, layout=layout, optimized=False)
            lse = plgpu.load(partial_lse_ref.at[split, head], layout=of_heads, optimized=False)
            new_maximum = jnp.maximum(maximum, lse)
            decay, weight = jnp.exp2(maximum - new_maximum), jnp.exp2(lse - new_maximum)
            acc = acc * lax.broadcast_in_dim(decay, shape, [1])
            acc = acc + part * lax.broadcast_in_dim(weight, shape, [1])
            return acc, new_maximum, total * decay + weight

        def constant(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
            filled: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
            return filled

        acc, _, total = lax.fori_loop(
            first_split_ref[merge],
            end_split_ref[merge],
            add_split,
            (
                constant(shape, 0.0, layout),
                constant(shape[1:], LOWEST, of_heads),
                constant(shape[1:], 0.0, of_heads),
            ),
        )
        out = acc / lax.broadcast_in_dim(total, shape, [1])
        _store_transposed(out_s, out.astype(problem.dtype))
        plgpu.copy_smem_to_gmem(
            out_s.at[pl.ds(0, problem.group)],
            out_ref.at[row, pl.ds(head * problem.group, problem.group)],
        )
        plgpu.wait_smem_to_gmem(0)
