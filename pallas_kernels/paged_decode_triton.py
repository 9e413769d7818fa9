"""Paged attention for decode in Pallas Triton: one query token a row.

Grid (K, splits): a program reduces one KV head over one stretch of one row, for the G query heads
of the group, padded to the 16 rows that the tensor cores want. A row in one stretch is written
out at once. The stretches of the others are merged in float32 by whichever program of the row ends
last: a kernel for that alone would cost each layer a launch, and a decode step is mostly launches.
Who is last, programs count in ``arrivals``, zeros that the last one restores: the array is the same
after the kernel as before, so all layers of a step share one.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum), in base 2.
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
from jaxengine.pallas_kernels.decode_splits import split_rows
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import DecodeConfig, num_extra_splits, triton_decode_config
from jaxtyping import Array, Float, Int

LOG2_E = math.log2(math.e)
# Starting maximum: finite, so that a tile whose keys are all masked gives 0 and not NaN.
LOWEST = -1e30
MERGED_AT_ONCE = 4  # splits, of up to 16 query heads; of more heads fewer, for want of registers


class _Problem(NamedTuple):
    """What is fixed at compile time: the shapes and options of one kernel."""

    tile_kv: int
    group: int
    padded_group: int
    head_dim: int
    padded_head_dim: int
    block_size: int
    options: AttentionOptions
    interpret: bool


def paged_decode_triton(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
    target: Target,
    config: DecodeConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row, the last of its sequence; rows of length 0 give 0.

    Args:
        q: Query of each row.
        k_cache: Keys of one layer.
        v_cache: Values, laid out like ``k_cache``.
        block_tables: Physical block ids of each row.
        seq_lens: KV length of each row; 0 for a padding row.
        alibi_slopes: slope[n] * (key position - query position) is added to the scores.
        sinks: Of each query head, a score that takes its share of the softmax and has no value.
        options: Scale, window and soft cap.
        target: The GPU.
        config: Tile sizes; None takes the measured ones.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If dtype, head_dim or group size are not served.
    """
    B, N, H = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = N // num_kv_heads
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"Triton decode takes bfloat16 or float16, not {q.dtype}")
    if H > 256 or group > 128:
        raise NotImplementedError(f"Triton decode: head_dim {H} > 256 or group {group} > 128")
    config = config or triton_decode_config(H, B, num_kv_heads, group, target.num_sms)
    problem = _Problem(
        tile_kv=config.tile_kv,
        group=group,
        padded_group=max(16, pl.next_power_of_2(group)),
        head_dim=H,
        padded_head_dim=max(16, pl.next_power_of_2(H)),
        block_size=block_size,
        options=options,
        interpret=interpret,
    )
    splits = split_rows(
        seq_lens,
        num_extra=num_extra_splits(config, num_kv_heads, target.num_sms),
        tile_kv=config.tile_kv,
        min_split_tokens=config.min_split_tokens,
        sliding_window=options.sliding_window,
    )
    num_splits = splits.row.shape[0]
    # Zeros that XLA cannot tell from others, or it would let them share their memory.
    arrivals = jnp.minimum(seq_lens.astype(jnp.int32), 0)[:, None] + jnp.zeros(
        (1, num_kv_heads), jnp.int32
    )
    call: Any = functools.partial(pl.pallas_call, interpret=interpret)
    out, _, _ = call(
        functools.partial(_reduce_split, problem),
        grid=(num_kv_heads, num_splits),
        out_shape=(
            jax.ShapeDtypeStruct((B, N, H), q.dtype),
            jax.ShapeDtypeStruct((num_splits, N, H), jnp.float32),
            jax.ShapeDtypeStruct((num_splits, N), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        name="paged_decode",
    )(
        *splits,
        seq_lens.astype(jnp.int32),
        block_tables,
        _float32(alibi_slopes),
        _float32(sinks),
        arrivals,
        q,
        k_cache,
        v_cache,
    )
    decoded: jax.Array = out
    return decoded


def _float32(array: jax.Array | None) -> jax.Array | None:
    return None if array is None else array.astype(jnp.float32)


def _heads_and_columns(
    problem: _Problem, head: jax.Array, padded_group: int
) -> tuple[jax.Array, ...]:
    """Query heads of the group, columns of the head, and a mask against the padding of both."""
    offsets = jnp.arange(padded_group)
    columns = jnp.arange(problem.padded_head_dim)
    is_real = (offsets < problem.group)[:, None] & (columns < problem.head_dim)[None, :]
    return head * problem.group + offsets, offsets < problem.group, columns, is_real


def _reduce_split(
    problem: _Problem,
    row_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    first_split_ref: Any,
    end_split_ref: Any,
    seq_lens_ref: Any,
    block_tables_ref: Any,
    slopes_ref: Any,
    sinks_ref: Any,
    arrivals_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    partial_out_ref: Any,
    partial_lse_ref: Any,
) -> None:
    head, split = pl.program_id(0), pl.program_id(1)
    row = row_ref[split]
    heads, is_head, columns, is_real = _heads_and_columns(problem, head, problem.padded_group)

    @pl.when(row >= 0)
    def _reduce_used_split() -> None:
        start, stop = start_ref[split], stop_ref[split]
        position = seq_lens_ref[row] - 1
        q = plt.load(q_ref.at[row, heads[:, None], columns[None, :]], mask=is_real, other=0.0)
        slopes = None
        if slopes_ref is not None:
            slopes = plt.load(slopes_ref.at[heads], mask=is_head, other=0.0)

        def load_tile(ref: Any, keys: jax.Array, blocks: jax.Array) -> jax.Array:
            mask = (keys < stop)[:, None]
            if problem.padded_head_dim != problem.head_dim:
                mask &= (columns < problem.head_dim)[None, :]
            offsets = lax.rem(keys, problem.block_size)
            tile = ref.at[blocks[:, None], head, offsets[:, None], columns[None, :]]
            return plt.load(tile, mask=mask, other=0.0)

        def reduce_tile(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, maximum, total = carry
            keys = start + i * problem.tile_kv + jnp.arange(problem.tile_kv)
            blocks = plt.load(
                block_tables_ref.at[row, lax.div(keys, problem.block_size)],
                mask=keys < stop,
                other=0,
            )
            k = load_tile(k_ref, keys, blocks)
            scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32)
            scores = _biased(problem, scores, keys - position, slopes)
            visible = keys < stop
            if problem.options.sliding_window is not None:
                visible &= keys > position - problem.options.sliding_window
            scores = jnp.where(visible[None, :], scores, LOWEST)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(scores - new_maximum[:, None])
            v = load_tile(v_ref, keys, blocks)
            weighted = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            acc = acc * decay[:, None] + weighted
            return acc, new_maximum, total * decay + weights.sum(axis=1)

        first_split = first_split_ref[split]

        def start_of_softmax() -> tuple[jax.Array, jax.Array]:
            lowest = jnp.full((problem.padded_group,), LOWEST, jnp.float32)
            nothing = jnp.zeros((problem.padded_group,), jnp.float32)
            if sinks_ref is None:
                return lowest, nothing
            # As a key without a value, which only the first split of a row has met.
            sinks = plt.load(sinks_ref.at[heads], mask=is_head, other=0.0) * LOG2_E
            is_first = split == first_split
            return jnp.where(is_first, sinks, lowest), jnp.where(is_first, nothing + 1, nothing)

        acc, maximum, total = lax.fori_loop(
            0,
            lax.div(stop - start + (problem.tile_kv - 1), problem.tile_kv),
            reduce_tile,
            (
                jnp.zeros((problem.padded_group, problem.padded_head_dim), jnp.float32),
                *start_of_softmax(),
            ),
        )
        out = acc / jnp.where(total > 0, total, 1.0)[:, None]
        end_split = end_split_ref[split]
        is_whole_row = end_split - first_split == 1

        @pl.when(is_whole_row)
        def _store() -> None:
            target = out_ref.at[row, heads[:, None], columns[None, :]]
            plt.store(target, out.astype(out_ref.dtype), mask=is_real)

        @pl.when(jnp.logical_not(is_whole_row))
        def _store_partial() -> None:
            target = partial_out_ref.at[split, heads[:, None], columns[None, :]]
            plt.store(target, out, mask=is_real)
            lse = maximum + jnp.log2(jnp.where(total > 0, total, 1.0))
            plt.store(partial_lse_ref.at[split, heads], lse, mask=is_head)
            if not problem.interpret:  # it has no threads
                plt.debug_barrier()  # all have stored when one reports it
            arrived = plt.atomic_add(arrivals_ref, (row, head), jnp.int32(1))

            @pl.when(arrived == end_split - first_split - 1)
            def _merge() -> None:
                arrivals_ref[row, head] = 0
                stretch = first_split, end_split
                _merge_splits(
                    problem, head, row, stretch, partial_out_ref, partial_lse_ref, out_ref
                )


def _biased(
    problem: _Problem, scores: jax.Array, distance: jax.Array, slopes: jax.Array | None
) -> jax.Array:
    """Scores times log2(e), ready for exp2."""
    cap, scale = problem.options.logits_soft_cap, problem.options.scale
    if cap is None:
        scores = scores * (scale * LOG2_E)
    else:
        scores = jnp.tanh(scores * (scale / cap)) * (cap * LOG2_E)
    if slopes is not None:
        scores += (slopes * LOG2_E)[:, None] * distance.astype(jnp.float32)[None, :]
    return scores


def _merge_splits(
    problem: _Problem,
    head: jax.Array,
    row: jax.Array,
    stretch: tuple[jax.Array, jax.Array],
    partial_out_ref: Any,
    partial_lse_ref: Any,
    out_ref: Any,
) -> None:
    first_split, end_split = stretch
    padded_group = pl.next_power_of_2(problem.group)  # no matrix product here
    at_once = max(1, MERGED_AT_ONCE * 16 // max(16, padded_group))
    heads, is_head, columns, is_real = _heads_and_columns(problem, head, padded_group)

    def load(place: Any, mask: jax.Array, other: float) -> jax.Array:
        # Past the L1 cache: other programs have just written, and it may hold what was
        # there before.
        return plt.load(place, mask=mask, other=other, volatile=True)

    def add_splits(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, maximum, total = carry
        splits = [first_split + i * at_once + j for j in range(at_once)]
        lses, parts = [], []
        for split in splits:  # all loads are under way before the first is used
            is_there = split < end_split
            lses.append(load(partial_lse_ref.at[split, heads], is_head & is_there, LOWEST))
            place = partial_out_ref.at[split, heads[:, None], columns[None, :]]
            parts.append(load(place, is_real & is_there, 0.0))
        new_maximum = functools.reduce(jnp.maximum, lses, maximum)
        decay = jnp.exp2(maximum - new_maximum)
        acc, total = acc * decay[:, None], total * decay
        for lse, part in zip(lses, parts, strict=True):
            weight = jnp.exp2(lse - new_maximum)
            acc, total = acc + part * weight[:, None], total + weight
        return acc, new_maximum, total

    acc, _, total = lax.fori_loop(
        0,
        lax.div(end_split - first_split + (at_once - 1), at_once),
        add_splits,
        (
            jnp.zeros((padded_group, problem.padded_head_dim), jnp.float32),
            jnp.full((padded_group,), LOWEST, jnp.float32),
            jnp.zeros((padded_group,), jnp.float32),
        ),
    )
    out = (acc / total[:, None]).astype(out_ref.dtype)
    plt.store(out_ref.at[row, heads[:, None], columns[None, :]], out, mask=is_real)
