"""Attention of packed tokens among themselves, without a cache: plain jnp, to differentiate.

All scores [T, N, T] are there at once: for sequences of thousands of tokens, not of a million.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.taps import Taps, tap


def dense_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    positions: Int[Array, " T"],
    segment_ids: Int[Array, " T"],
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
    taps: Taps | None = None,
) -> Float[Array, "T N H"]:
    """Attend each token to itself and to those before it in its segment, in float32.

    Args:
        q: Queries; head n uses KV head n // (N // K).
        k: Keys, rotated.
        v: Values.
        positions: Of the tokens in their sequences; windows and ALiBi count in them.
        segment_ids: Tokens of equal ids see each other.
        alibi_slopes: slope[n] * (key position - query position) is added to the scores.
        sinks: Of each query head, a score that takes its share of the softmax and has no value.
        options: Scale, window and soft cap.
        taps: Told the point "pattern", the probabilities [T, N, T] without a sink's.

    Returns:
        Attention output in q.dtype.
    """
    T, N, H = q.shape
    num_kv_heads = k.shape[1]
    queries = q.reshape(T, num_kv_heads, N // num_kv_heads, H).astype(jnp.float32)
    scores = options.scale * jnp.einsum(
        "TKGH,SKH->TKGS", queries, k.astype(jnp.float32), precision="highest"
    ).reshape(T, N, T)
    if (cap := options.logits_soft_cap) is not None:
        scores = cap * jnp.tanh(scores / cap)
    distances = positions[None, :] - positions[:, None]
    if alibi_slopes is not None:
        scores += alibi_slopes.astype(jnp.float32)[:, None] * distances[:, None, :]
    order = jnp.arange(T)
    visible = (segment_ids[:, None] == segment_ids[None, :]) & (order[:, None] >= order[None, :])
    if options.sliding_window is not None:
        # A token sees itself whatever its position is: no row of the softmax is empty.
        visible &= distances > -options.sliding_window
    scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None], (T, N, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    pattern = tap(taps, "pattern", jax.nn.softmax(scores, axis=-1)[..., :T])
    grouped = pattern.reshape(T, num_kv_heads, -1, T)
    attended = jnp.einsum("TKGS,SKH->TKGH", grouped, v.astype(jnp.float32), precision="highest")
    return attended.reshape(T, N, H).astype(q.dtype)
