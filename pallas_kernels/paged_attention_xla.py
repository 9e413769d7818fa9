"""Paged attention in plain XLA: what the CPU runs, and the fallback for shapes no kernel serves.

Loops over KV tiles have a dynamic trip count, so the width of the block table costs nothing, and
padding rows next to nothing. The softmax is merged tile by tile.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum), in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

# Tile sizes measured on a 2-core CPU with SmolLM2's shapes (9 query heads, 3 KV heads of 64).
DECODE_TILE_KV = 64
DECODE_GROUP_ROWS = 4
MAX_DECODE_GROUPS = 8
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
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
    target: Target,
) -> Float[Array, "B N H"]:
    """Attention of one query token a row, the last of its sequence; rows of length 0 give 0.

    Rows are sorted by length and walked in groups, tile by tile: a group takes as long as its
    longest row, and the groups' loops run beside each other. Arguments are those of the op.
    """
    del target  # serves all
    B, K = q.shape[0], k_cache.shape[1]
    slopes, sinks = _by_kv_head(alibi_slopes, K), _by_kv_head(sinks, K)
    sinks = None if sinks is None else sinks[..., 0]

    def attend(q: jax.Array, block_tables: jax.Array, seq_lens: jax.Array) -> jax.Array:
        return _decode_in_lockstep(
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            slopes,
            sinks,
            options=options,
        )

    num_groups = min(MAX_DECODE_GROUPS, B // DECODE_GROUP_ROWS)
    if num_groups < 2:
        return attend(q, block_tables, seq_lens)
    order = jnp.argsort(seq_lens)
    groups = [order[B * group // num_groups : B * (group + 1) // num_groups]
              for group in range(num_groups)]  # fmt: skip
    out = [attend(q[rows], block_tables[rows], seq_lens[rows]) for rows in groups]
    return jnp.concatenate(out)[jnp.argsort(order)]


def _decode_in_lockstep(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    options: AttentionOptions,
) -> jax.Array:
    """Attend a group of rows, all to their next KV tile at a time."""
    B, N, H = q.shape
    K, block_size = k_cache.shape[1:3]
    G = N // K
    window = options.sliding_window
    blocks_per_tile = max(1, DECODE_TILE_KV // block_size)
    tile_kv = blocks_per_tile * block_size
    queries = q.reshape(B, K, G, H).astype(jnp.float32) * options.scale
    padding = -block_tables.shape[1] % blocks_per_tile
    block_tables = jnp.pad(block_tables, ((0, 0), (0, padding)))  # a slice must not be shifted

    def reduce_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, maximum, total = carry
        blocks = lax.dynamic_slice_in_dim(
            block_tables, tile * blocks_per_tile, blocks_per_tile, axis=1
        )
        # Rows that have ended all read block 0, which stays in the processor's cache.
        blocks = jnp.where((tile * tile_kv < seq_lens)[:, None], blocks, 0)
        k, v = _gather(k_cache, blocks), _gather(v_cache, blocks)  # [B, K, tile_kv, H]

        distance = tile * tile_kv + jnp.arange(tile_kv) - (seq_lens - 1)[:, None]
        scores = jnp.einsum("BKGH,BKSH->BKGS", queries, k, precision="highest")
        scores = _biased(scores, distance[:, None, None], slopes, options)
        visible = distance <= 0
        if window is not None:
            visible &= distance > -window
        scores = jnp.where(visible[:, None, None], scores, MASKED)

        new_maximum = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.exp(scores - new_maximum[..., None])
        decay = jnp.exp(maximum - new_maximum)
        # Not a matrix product: XLA reads V where it lies, without copying the tile first.
        weighted = (weights[..., None] * v[:, :, None]).sum(3)
        return acc * decay[..., None] + weighted, new_maximum, total * decay + weights.sum(-1)

    start = (jnp.zeros((B, K, G, H), jnp.float32), *_start(sinks, (B, K, G)))
    first_key = 0 if window is None else jnp.maximum(seq_lens.min() - window, 0)
    end_tile = (seq_lens.max() + tile_kv - 1) // tile_kv
    acc, _, total = lax.fori_loop(first_key // tile_kv, end_tile, reduce_tile, start)
    # A row of length 0 has only met masked keys, each with weight 1.
    out = jnp.where((seq_lens > 0)[:, None, None, None], _normalised(acc, total), 0.0)
    return out.reshape(B, N, H).astype(q.dtype)


def ragged_attention_xla(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    query_start_loc: Int[Array, " B_plus_1"],
    num_decode_rows: Int[Array, ""],
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
    target: Target,
) -> Float[Array, "T N H"]:
    """Attention of the rows from ``num_decode_rows`` on; other tokens give 0.

    Arguments are those of the op.
    """
    del target  # serves all
    T, K = q.shape[0], k_cache.shape[1]
    slopes, sinks = _by_kv_head(alibi_slopes, K), _by_kv_head(sinks, K)
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
            slopes,
            sinks,
            tile_q=tile_q,
            tile_kv=tile_kv,
            options=options,
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
    slopes: jax.Array | None,
    sinks: jax.Array | None,
    *,
    tile_q: int,
    tile_kv: int,
    options: AttentionOptions,
) -> jax.Array:
    """Fill in the rows of ``out`` that have query_lens > 0, one query tile after the other."""
    _, N, H = q.shape
    K, block_size = k_cache.shape[1:3]
    G = N // K
    blocks_per_tile = max(1, tile_kv // block_size)
    tile_kv = blocks_per_tile * block_size
    slopes = None if slopes is None else slopes[..., None]
    window = options.sliding_window
    num_tiles = (query_lens + tile_q - 1) // tile_q
    ends = jnp.cumsum(num_tiles)

    def reduce_query_tile(item: jax.Array, out: jax.Array) -> jax.Array:
        row = _row_of(item, ends)
        row_offset = (item - ends[row] + num_tiles[row]) * tile_q
        token = query_start_loc[row] + row_offset
        first_position = seq_lens[row] - query_lens[row] + row_offset
        position = first_position + jnp.arange(tile_q)
        queries = lax.dynamic_slice_in_dim(q, token, tile_q).astype(jnp.float32) * options.scale
        queries = queries.reshape(tile_q, K, G, H).transpose(1, 2, 0, 3)

        def reduce_kv_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, maximum, total = carry
            columns = tile * blocks_per_tile + jnp.arange(blocks_per_tile)
            blocks = block_tables.at[row, columns].get(mode="clip")
            k, v = _gather(k_cache, blocks), _gather(v_cache, blocks)  # [K, tile_kv, H]
            distance = (tile * tile_kv + jnp.arange(tile_kv)) - position[:, None]
            scores = jnp.einsum("KGQH,KSH->KGQS", queries, k, precision="highest")
            scores = _biased(scores, distance, slopes, options)
            visible = distance <= 0
            if window is not None:
                visible &= distance > -window
            scores = jnp.where(visible, scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            decay = jnp.exp(maximum - new_maximum)
            weighted = jnp.einsum("KGQS,KSH->KGQH", weights, v, precision="highest")
            return acc * decay[..., None] + weighted, new_maximum, total * decay + weights.sum(-1)

        first_key = 0 if window is None else first_position - window + 1
        last_key = jnp.minimum(first_position + tile_q, seq_lens[row])
        start = (
            jnp.zeros((K, G, tile_q, H), jnp.float32),
            *_start(sinks, (K, G, tile_q)),
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


def _by_kv_head(per_head: jax.Array | None, K: int) -> jax.Array | None:
    """Numbers of the query heads, [K, G, 1]."""
    return None if per_head is None else per_head.astype(jnp.float32).reshape(K, -1, 1)


def _start(sinks: jax.Array | None, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Maximum and total of a softmax that has met no key yet; a sink is as one key without value.

    Args:
        sinks: What broadcasts to the shape, or None.
        shape: [B, K, G] or [K, G, Q].
    """
    if sinks is None:
        return jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    return jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)


def _biased(
    scores: jax.Array, distance: jax.Array, slopes: jax.Array | None, options: AttentionOptions
) -> jax.Array:
    cap = options.logits_soft_cap
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    return scores if slopes is None else scores + slopes * distance


def _normalised(acc: jax.Array, total: jax.Array) -> jax.Array:
    return acc / jnp.where(total > 0, total, 1.0)[..., None]
