"""Work list of ragged prefill attention: which query tokens each kernel program takes.

The packed query tokens of a step are cut into tiles of at most ``tile_q`` tokens of one row. How
many tiles there are is known only at run time, so the list has the static upper bound as length
and its tail is empty. Tiles that attend to the longest context come first: they take the longest,
and a long tile started last would leave the rest of the GPU waiting for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class RaggedTiles(NamedTuple):
    """One entry per tile, heaviest first; unused entries (``num_tokens == 0``) are last.

    Of the tokens of a tile, those from ``start`` to ``num_tokens`` are its own.
    """

    row: jax.Array  # [num_tiles] int32 row of the batch: whose block table to read
    token: jax.Array  # [num_tiles] int32 first token, an index into the T packed tokens
    start: jax.Array  # [num_tiles] int32 tokens to leave alone first: they are another row's
    num_tokens: jax.Array  # [num_tiles] int32 tokens up to the tile's last one, at most tile_q
    position: jax.Array  # [num_tiles] int32 position of ``token`` in its sequence;
    #   position + num_tokens is the number of keys the tile sees, none of them if it is <= 0
    num_tiles: jax.Array  # [1] int32 number of used entries


def max_num_tiles(num_tokens: int, num_rows: int, tile_q: int, alignment: int) -> int:
    """Return how many tiles T packed tokens of B rows, and the two filler rows, can need."""
    partial_tiles = -(-(num_rows + 2) * (tile_q + alignment - 2) // tile_q)
    return min(num_tokens, num_tokens // tile_q + partial_tiles)


def build_ragged_tiles(
    query_start_loc: Int[Array, " B+1"],
    seq_lens: Int[Array, " B"],
    num_decode_rows: Int[Array, ""],
    *,
    num_tokens: int,
    tile_q: int,
    alignment: int = 1,
) -> RaggedTiles:
    """Cut the queries of every row from ``num_decode_rows`` on into tiles.

    Tokens that belong to none of those rows (decode rows and padding) form two more rows without
    keys, for which a kernel stores zeros: its output is then defined everywhere.

    The list depends on nothing that changes between layers: computed in each layer of one jitted
    step it is computed once, since XLA merges equal operations.

    Args:
        query_start_loc: First packed token of each row, and the number of tokens at the end.
        seq_lens: KV length of each row, this step's tokens included; 0 for a padding row.
        num_decode_rows: The first rows, which another kernel serves.
        num_tokens: T, the padded number of packed tokens.
        tile_q: Query tokens of a tile, at least ``alignment``.
        alignment: Tiles begin at multiples of it, for a kernel that can load no others: the first
            tile of a row then begins up to ``alignment - 1`` tokens before the row.

    Returns:
        The list, of length ``max_num_tiles(T, B, tile_q, alignment)``.
    """
    num_rows = seq_lens.shape[0]
    num_decode_rows = jnp.asarray(num_decode_rows, jnp.int32).reshape(1)
    num_used_tokens = query_start_loc[-1:]
    filler_starts = jnp.concatenate([jnp.zeros_like(num_decode_rows), num_used_tokens])
    filler_lens = jnp.concatenate([num_decode_rows, num_tokens - num_used_tokens])
    is_decode = jnp.arange(num_rows) < num_decode_rows
    query_lens = jnp.where(is_decode, 0, query_start_loc[1:] - query_start_loc[:-1])
    query_lens = jnp.concatenate([query_lens, filler_lens])
    starts = jnp.concatenate([query_start_loc[:-1], filler_starts])
    seq_lens = jnp.concatenate([seq_lens, jnp.zeros_like(filler_lens)])

    lead = lax.rem(starts, jnp.int32(alignment))
    row_tiles = lax.div(query_lens + lead + (tile_q - 1), jnp.int32(tile_q))
    row_tiles = jnp.where(query_lens > 0, row_tiles, 0)
    ends = jnp.cumsum(row_tiles)
    length = max_num_tiles(num_tokens, num_rows, tile_q, alignment)
    tile = jnp.arange(length, dtype=jnp.int32)
    # Comparing with all row ends is one fused kernel; a binary search would be a loop of launches.
    row = jnp.sum(ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, num_rows + 1)
    offset = (tile - (ends - row_tiles)[row]) * tile_q - lead[row]  # of ``token`` in the row
    is_used = tile < ends[-1]
    token = jnp.where(is_used, starts[row] + offset, 0)
    start = jnp.where(is_used, jnp.maximum(-offset, 0), 0)
    valid = jnp.where(is_used, jnp.minimum(query_lens[row] - offset, tile_q), 0)
    position = jnp.where(is_used, (seq_lens - query_lens)[row] + offset, 0)
    row = jnp.minimum(row, num_rows - 1)
    lightness = jnp.where(is_used, -(position + valid), jnp.iinfo(jnp.int32).max)
    columns = lax.sort((lightness, row, token, start, valid, position), num_keys=1)
    _, row, token, start, valid, position = columns
    return RaggedTiles(row, token, start, valid, position, ends[-1:])


def key_tiles(
    position: jax.Array, num_tokens: jax.Array, tile_kv: int, sliding_window: int | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the range of key tiles of a query tile, and the range that needs no mask within it.

    Args:
        position: Position of the first query.
        num_tokens: Number of queries.
        tile_kv: Keys of a tile.
        sliding_window: A query sees that many last keys, its own included; None for all.

    Returns:
        ``first <= first_full <= last_full <= last``: tiles [first, last) hold visible keys, and in
        [first_full, last_full) every query sees every key.
    """
    width = jnp.int32(tile_kv)
    last = lax.div(jnp.maximum(position + num_tokens, 0) + (tile_kv - 1), width)
    last_full = lax.div(jnp.maximum(position + 1, 0), width)
    if sliding_window is None:
        zero = jnp.int32(0)
        return zero, zero, last_full, last
    first_key = jnp.maximum(position - (sliding_window - 1), 0)
    last_query_first_key = jnp.maximum(position + num_tokens - sliding_window, 0)
    first = lax.div(first_key, width)
    first_full = jnp.minimum(lax.div(last_query_first_key + (tile_kv - 1), width), last)
    return first, first_full, jnp.maximum(last_full, first_full), last
