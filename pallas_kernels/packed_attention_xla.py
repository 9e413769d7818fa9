"""Attention of packed sequences without a cache in plain XLA: what the CPU runs, and the fallback.

Query tiles of the real lengths, each against the key tiles of its own row: the number of both is
dynamic, so that nothing is padded to the longest row. The softmax is merged tile by tile.
Source: FlashAttention, arXiv:2205.14135, Algorithm 1 (running maximum and sum), in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

TILE_Q = 32
TILE_KV = 64
# Finite, so that a tile without a visible key gives exp(MASKED - MASKED) = 1, never NaN; the next
# visible key scales that 1 by exp(MASKED - score) = 0.
MASKED = -1e30


def packed_attention_xla(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    query_start_loc: Int[Array, " B_plus_1"],
    *,
    options: AttentionOptions,
    is_causal: bool,
    target: Target,
) -> Float[Array, "T N H"]:
    """As ``packed_attention``."""
    del target  # serves all
    T, N, H = q.shape
    K, window = k.shape[1], options.sliding_window
    lens = jnp.diff(query_start_loc)
    num_tiles = (lens + TILE_Q - 1) // TILE_Q
    ends = jnp.cumsum(num_tiles)
    # A tile may start at the last token.
    q = jnp.pad(q, ((0, TILE_Q), (0, 0), (0, 0)))
    k, v = (jnp.pad(array, ((0, TILE_KV), (0, 0), (0, 0))) for array in (k, v))

    def attend(item: jax.Array, out: jax.Array) -> jax.Array:
        row = (ends <= item).sum()
        start, length = query_start_loc[row], lens[row]
        first = (item - ends[row] + num_tiles[row]) * TILE_Q
        position = first + jnp.arange(TILE_Q)
        queries = lax.dynamic_slice_in_dim(q, start + first, TILE_Q).astype(jnp.float32)
        queries = (queries * options.scale).reshape(TILE_Q, K, N // K, H).transpose(1, 2, 0, 3)

        def reduce_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, maximum, total = carry
            key = tile * TILE_KV + jnp.arange(TILE_KV)
            keys, values = (
                lax.dynamic_slice_in_dim(array, start + tile * TILE_KV, TILE_KV)
                .astype(jnp.float32)
                .transpose(1, 0, 2)
                for array in (k, v)
            )
            scores = jnp.einsum("KGQH,KSH->KGQS", queries, keys, precision="highest")
            if options.logits_soft_cap is not None:
                scores = options.logits_soft_cap * jnp.tanh(scores / options.logits_soft_cap)
            distance = position[:, None] - key
            visible = jnp.broadcast_to(key < length, distance.shape)
            if is_causal:
                visible &= distance >= 0
            if window is not None:
                visible &= jnp.abs(distance) < window
            scores = jnp.where(visible, scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            decay = jnp.exp(maximum - new_maximum)
            weighted = jnp.einsum("KGQS,KSH->KGQH", weights, values, precision="highest")
            return acc * decay[..., None] + weighted, new_maximum, total * decay + weights.sum(-1)

        first_key = 0 if window is None else jnp.maximum(first - window + 1, 0)
        end_key = length
        if is_causal:
            end_key = jnp.minimum(length, first + TILE_Q)
        elif window is not None:
            end_key = jnp.minimum(length, first + TILE_Q - 1 + window)
        shape = (K, N // K, TILE_Q)
        acc, _, total = lax.fori_loop(
            first_key // TILE_KV,
            (end_key + TILE_KV - 1) // TILE_KV,
            reduce_tile,
            (jnp.zeros((*shape, H)), jnp.full(shape, MASKED), jnp.zeros(shape)),
        )
        tile_out = (acc / total[..., None]).transpose(2, 0, 1, 3).reshape(TILE_Q, N, H)
        # The end of the row's last tile belongs to other rows: keep what is there.
        others = lax.dynamic_slice_in_dim(out, start + first, TILE_Q)
        is_own = (position < length)[:, None, None]
        merged = jnp.where(is_own, tile_out.astype(out.dtype), others)
        return lax.dynamic_update_slice_in_dim(out, merged, start + first, 0)

    return lax.fori_loop(0, ends[-1], attend, jnp.zeros_like(q))[:T]
