"""Work list of decode attention: which stretch of which row's KV cache each program reduces.

A row is split only if it holds more than its share of the step's KV tokens. The list therefore
has at most B + num_extra entries, however wide the block table and however uneven the rows, and
all entries take about the same time. Rows that are not split need no merging.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class DecodeSplits(NamedTuple):
    """One entry a split, in row order. Unused entries come last."""

    row: jax.Array  # [num_splits] int32; -1 for an unused entry
    start: jax.Array  # [num_splits] int32 first KV position, a multiple of tile_kv
    stop: jax.Array  # [num_splits] int32 end position; <= start for a padding row
    first_split: jax.Array  # [num_splits] int32 index of the first split of the same row
    end_split: jax.Array  # [num_splits] int32 index after its last


def split_rows(
    seq_lens: Int[Array, " B"],
    *,
    num_extra: int,
    tile_kv: int,
    min_split_tokens: int,
    sliding_window: int | None = None,
) -> DecodeSplits:
    """Cut every row's visible KV into splits of about equal length.

    The list depends on nothing that changes between layers: computed in each layer of one jitted
    step it is computed once, since XLA merges equal operations.

    Args:
        seq_lens: KV length of each row; 0 for a padding row, which gets one empty split.
        num_extra: How many splits there may be beyond one a row; at least 1.
        tile_kv: Splits start at multiples of it.
        min_split_tokens: Shorter splits are not worth the merging.
        sliding_window: Keys at or before seq_len - 1 - sliding_window are left out.
    """
    B = seq_lens.shape[0]
    first_tile = jnp.zeros_like(seq_lens)
    if sliding_window is not None:
        first_tile = jnp.maximum(seq_lens - sliding_window, 0) // tile_kv
    num_tiles = _ceil_div(seq_lens, tile_kv) - first_tile
    share = _ceil_div(num_tiles.sum(), num_extra)
    share = jnp.maximum(share, _ceil_div(min_split_tokens, tile_kv))
    # Equal splits; after rounding a row may need fewer of them than its share allowed.
    tiles_per_split = jnp.maximum(_ceil_div(num_tiles, _ceil_div(num_tiles, share)), 1)
    splits_of_row = jnp.maximum(_ceil_div(num_tiles, tiles_per_split), 1)
    ends = jnp.cumsum(splits_of_row)

    split = jnp.arange(B + num_extra)
    is_used = split < ends[-1]
    row = jnp.minimum(jnp.searchsorted(ends, split, side="right", method="compare_all"), B - 1)
    index = split - ends[row] + splits_of_row[row]
    start = (first_tile[row] + index * tiles_per_split[row]) * tile_kv
    stop = jnp.minimum(start + tiles_per_split[row] * tile_kv, seq_lens[row])
    return DecodeSplits(
        row=_int32(jnp.where(is_used, row, -1)),
        start=_int32(start),
        stop=_int32(stop),
        first_split=_int32(jnp.where(is_used, ends[row] - splits_of_row[row], 0)),
        end_split=_int32(jnp.where(is_used, ends[row], 0)),
    )


def _ceil_div(a: jax.Array | int, b: jax.Array | int) -> jax.Array:
    return (jnp.asarray(a) + b - 1) // jnp.maximum(b, 1)


def _int32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32)
