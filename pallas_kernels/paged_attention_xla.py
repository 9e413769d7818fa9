"""Paged attention in plain XLA: what the CPU runs, and the fallback for shapes no kernel serves.

Work is a list of (row, KV tile) items for decode and (query tile, KV tile) items for ragged rows,
walked by loops with a dynamic trip count: neither the width of the block table nor padding rows
cost anything. The softmax is merged tile by tile.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum), in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Tile sizes measured on a 2-core CPU with SmolLM2's shapes (9 query heads, 3 KV heads of 64).
DECODE_TILE_KV = 64
MAX_DECODE_ITEMS = 16
# Ragged rows: (tile_q, tile_kv, fewest query tokens). Large tiles keep matrix products busy,
# small ones waste little on short rows; a row takes the last entry that it is long enough for.
RAGGED_TILES = ((16, 64, 1), (64, 256, 256))
# Finite, so that a tile without a visible key gives exp(MASKED - MASKED) = 1, never NaN; the next
# visible key scales that 1 by exp(MASKED - score) = 0.
MASKED = -1e30


def paged_decode_xla(
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
) -> Float[Array, "B N H"]:
    """Attention of one query token a row, the last of its sequence; rows of length 0 give 0.

    Each iteration reduces a fixed number of (row, tile) items, whichever rows they belong to, so
    the work is that of the real lengths, not of B times the longest.
    """
    B, N, H = q.shape
    K, block_size = k_cache.shape[1:3]
    G = N // K
    blocks_per_tile = max(1, DECODE_TILE_KV // block_size)
    tile_kv = blocks_per_tile * block_size
    items = min(MAX_DECODE_ITEMS, max(2, B))
    queries = q.reshape(B, K, G, H).astype(jnp.float32) * scale
    slopes = _grouped_slopes(alibi_slopes, K)

    first_key = 0 if sliding_window is None else jnp.maximum(seq_lens - sliding_window, 0)
    first_tile = first_key // tile_kv
    num_tiles = jnp.maximum((seq_lens + tile_kv - 1) // tile_kv - first_tile, 0)
    ends = jnp.cumsum(num_tiles)
    tile_shift = first_tile - (ends - num_tiles)  # item + shift of its row = tile of the row

    def reduce_items(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, maximum, total = carry
        item = step * items + jnp.arange(items)
        is_real = item < ends[-1]
        row = jnp.minimum(_row_of(item, ends), B - 1)
        tile = jnp.where(is_real, item + tile_shift[row], 0)
        columns = tile[:, None] * blocks_per_tile + jnp.arange(blocks_per_tile)
        blocks = block_tables.at[row[:, None], columns].get(mode="clip")
        k, v = _gather(k_cache, blocks), _gather(v_cache, blocks)  # [items, K, tile_kv, H]

        position = (seq_lens[row] - 1)[:, None]
        key_position = tile[:, None] * tile_kv + jnp.arange(tile_kv)
        scores = jnp.einsum("IKGH,IKSH->IKGS", queries[row], k, precision="highest")
        scores = _biased(scores, (key_position - position)[:, None, None], slopes, logits_soft_cap)
        visible = (key_position <= position) & is_real[:, None]
        if sliding_window is not None:
            visible &= key_position > position - sliding_window
        visible = visible[:, None, None]

        new_maximum = maximum.at[row].max(jnp.where(visible, scores, MASKED).max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_maximum[row][..., None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        total = (total * decay).at[row].add(weights.sum(-1))
        weighted = jnp.einsum("IKGS,IKSH->IKGH", weights, v, precision="highest")
        return (acc * decay[..., None]).at[row].add(weighted), new_maximum, total

    start = (
        jnp.zeros((B, K, G, H), jnp.float32),
        jnp.full((B, K, G), MASKED, jnp.float32),
        jnp.zeros((B, K, G), jnp.float32),
    )
    num_steps = (ends[-1] + items - 1) // items
    acc, _, total = lax.fori_loop(0, num_steps, reduce_items, start)
    return _normalised(acc, total).reshape(B, N, H).astype(q.dtype)


def ragged_attention_xla(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    query_start_loc: Int[Array, " B_plus_1"],
    num_decode_rows: Int[Array, ""],
    *,
    scale: float,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
) -> Float[Array, "T N H"]:
    """Attention of the rows from ``num_decode_rows`` on; other tokens give 0."""
    T = q.shape[0]
    query_lens = jnp.diff(query_start_loc)
    is_ragged = jnp.arange(block_tables.shape[0]) >= num_decode_rows
    widest = max(tile_q for tile_q, _, _ in RAGGED_TILES)
    padded_q = jnp.pad(q, ((0, widest), (0, 0), (0, 0)))  # a tile may start at the last token
    out = jnp.zeros_like(padded_q)
    longest = T + 1
    for tile_q, tile_kv, shortest in reversed(RAGGED_TILES):
        if shortest > T:
            continue
        is_mine = is_ragged & (query_lens >= shortest) & (query_lens < longest)
        longest = shortest
        out = _attend_rows(
            out,
            padded_q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            query_start_loc,
            jnp.where(is_mine, query_lens, 0),
            tile_q=tile_q,
            tile_kv=tile_kv,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            alibi_slopes=alibi_slopes,
        )
    return out[:T]


def _attend_rows(
    out: jax.Array,
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    query_lens: jax.Array,
    *,
    tile_q: int,
    tile_kv: int,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: jax.Array | None,
) -> jax.Array:
    """Fill in the rows of ``out`` that have query_lens > 0, one query tile after the other."""
    _, N, H = q.shape
    K, block_size = k_cache.shape[1:3]
    G = N // K
    blocks_per_tile = max(1, tile_kv // block_size)
    tile_kv = blocks_per_tile * block_size
    slopes = _grouped_slopes(alibi_slopes, K)[..., None]
    num_tiles = (query_lens + tile_q - 1) // tile_q
    ends = jnp.cumsum(num_tiles)

    def reduce_query_tile(item: jax.Array, out: jax.Array) -> jax.Array:
        row = _row_of(item, ends)
        row_offset = (item - ends[row] + num_tiles[row]) * tile_q
        token = query_start_loc[row] + row_offset
        first_position = seq_lens[row] - query_lens[row] + row_offset
        position = first_position + jnp.arange(tile_q)
        queries = lax.dynamic_slice_in_dim(q, token, tile_q).astype(jnp.float32) * scale
        queries = queries.reshape(tile_q, K, G, H).transpose(1, 2, 0, 3)

        def reduce_kv_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, maximum, total = carry
            columns = tile * blocks_per_tile + jnp.arange(blocks_per_tile)
            blocks = block_tables.at[row, columns].get(mode="clip")
            k, v = _gather(k_cache, blocks), _gather(v_cache, blocks)  # [K, tile_kv, H]
            distance = (tile * tile_kv + jnp.arange(tile_kv)) - position[:, None]
            scores = jnp.einsum("KGQH,KSH->KGQS", queries, k, precision="highest")
            scores = _biased(scores, distance, slopes, logits_soft_cap)
            visible = distance <= 0
            if sliding_window is not None:
                visible &= distance > -sliding_window
            scores = jnp.where(visible, scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            decay = jnp.exp(maximum - new_maximum)
            weighted = jnp.einsum("KGQS,KSH->KGQH", weights, v, precision="highest")
            return acc * decay[..., None] + weighted, new_maximum, total * decay + weights.sum(-1)

        first_key = 0 if sliding_window is None else first_position - sliding_window + 1
        last_key = jnp.minimum(first_position + tile_q, seq_lens[row])
        start = (
            jnp.zeros((K, G, tile_q, H), jnp.float32),
            jnp.full((K, G, tile_q), MASKED, jnp.float32),
            jnp.zeros((K, G, tile_q), jnp.float32),
        )
        acc, _, total = lax.fori_loop(
            jnp.maximum(first_key, 0) // tile_kv,
            (last_key + tile_kv - 1) // tile_kv,
            reduce_kv_tile,
            start,
        )
        tile_out = _normalised(acc, total).transpose(2, 0, 1, 3).reshape(tile_q, N, H)
        # The end of the row's last tile belongs to other rows: keep what is there.
        is_own = (position < seq_lens[row])[:, None, None]
        others = lax.dynamic_slice_in_dim(out, token, tile_q)
        merged = jnp.where(is_own, tile_out.astype(out.dtype), others)
        return lax.dynamic_update_slice_in_dim(out, merged, token, 0)

    return lax.fori_loop(0, ends[-1], reduce_query_tile, out)


def _row_of(item: jax.Array, ends: jax.Array) -> jax.Array:
    """Row whose items include ``item``, given the end of each row's items."""
    return (ends <= item[..., None]).sum(-1)


def _gather(cache: jax.Array, blocks: jax.Array) -> jax.Array:
    """Keys or values of a run of blocks, float32: [..., num] block ids -> [..., K, num * block, H].

    The heads are folded into the block index, so that the copy comes out in the order the matrix
    product wants, and each copied piece is contiguous.
    """
    num_blocks, K, block_size, H = cache.shape
    pieces = cache.reshape(num_blocks * K, block_size * H)
    index = blocks[..., None, :] * K + jnp.arange(K)[:, None]
    tile = jnp.take(pieces, index, axis=0, mode="clip").astype(jnp.float32)
    return tile.reshape(*blocks.shape[:-1], K, blocks.shape[-1] * block_size, H)


def _grouped_slopes(alibi_slopes: jax.Array | None, K: int) -> jax.Array:
    if alibi_slopes is None:
        return jnp.zeros((K, 1, 1), jnp.float32)
    return alibi_slopes.astype(jnp.float32).reshape(K, -1, 1)


def _biased(
    scores: jax.Array, distance: jax.Array, slopes: jax.Array, logits_soft_cap: float | None
) -> jax.Array:
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    return scores + slopes * distance


def _normalised(acc: jax.Array, total: jax.Array) -> jax.Array:
    return acc / jnp.where(total > 0, total, 1.0)[..., None]
