"""Paged attention in plain jnp: the specification the other implementations are tested against.

One query token at a time over the whole block table, dense, in float32. Nothing here is fast.
"""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxtyping import Array, Float, Int


def paged_attention_reference(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    query_start_loc: Int[Array, " B_plus_1"],
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
) -> Float[Array, "T N H"]:
    """Attend each query token to the keys of its row at or before its own position.

    Args:
        q: Packed query tokens: row b owns tokens query_start_loc[b] to query_start_loc[b + 1];
            they are the last ones of its sequence.
        k_cache: Keys of one layer; position p of row b is in block
            block_tables[b, p // block_size], at offset p % block_size.
        v_cache: Values, laid out like ``k_cache``.
        block_tables: Physical block ids of each row.
        seq_lens: KV length of each row, this step's tokens included; 0 for a padding row.
        query_start_loc: First token of each row, and the end of the last.
        alibi_slopes: slope[n] * (key position - query position) is added to the scores.
        sinks: Of each query head, a score that takes its share of the softmax and has no value.
        options: Scale, window and soft cap.

    Returns:
        Attention output in q.dtype; 0 for tokens that belong to no row.
    """
    T, N, H = q.shape
    num_kv_heads = k_cache.shape[1]
    last_row = block_tables.shape[0] - 1

    def one_token(t: jax.Array) -> jax.Array:
        row = jnp.searchsorted(query_start_loc, t, side="right") - 1  # empty rows are skipped
        owned = (row >= 0) & (row <= last_row)
        row = jnp.clip(row, 0, last_row)
        position = seq_lens[row] - query_start_loc[row + 1] + t
        k = jnp.moveaxis(k_cache[block_tables[row]], 1, 0).reshape(num_kv_heads, -1, H)
        v = jnp.moveaxis(v_cache[block_tables[row]], 1, 0).reshape(num_kv_heads, -1, H)
        key_positions = jnp.arange(k.shape[1])
        visible = owned & (key_positions <= position)
        if options.sliding_window is not None:
            visible &= key_positions > position - options.sliding_window

        queries = q[t].reshape(num_kv_heads, N // num_kv_heads, H).astype(jnp.float32)
        scores = options.scale * jnp.einsum(
            "KGH,KSH->KGS", queries, k.astype(jnp.float32), precision="highest"
        )
        cap = options.logits_soft_cap
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        if alibi_slopes is not None:
            slopes = alibi_slopes.astype(jnp.float32).reshape(num_kv_heads, -1, 1)
            scores += slopes * (key_positions - position)
        is_in_softmax = jnp.broadcast_to(visible, scores.shape)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1)
            scores = jnp.concatenate([scores, sink], axis=-1)
            is_in_softmax = jnp.pad(is_in_softmax, ((0, 0), (0, 0), (0, 1)), constant_values=True)
        # where= keeps a token with no visible key at probability 0 instead of NaN.
        probabilities = jax.nn.softmax(scores, axis=-1, where=is_in_softmax)
        probabilities = probabilities[..., : k.shape[1]]
        values = jnp.where(visible[:, None], v.astype(jnp.float32), 0.0)
        return jnp.einsum("KGS,KSH->KGH", probabilities, values, precision="highest").reshape(N, H)

    return jax.lax.map(one_token, jnp.arange(T)).astype(q.dtype)
