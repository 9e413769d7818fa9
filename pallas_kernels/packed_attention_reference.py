"""Attention of packed sequences without a cache in plain jnp: the specification, dense."""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxtyping import Array, Float, Int


def packed_attention_reference(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    query_start_loc: Int[Array, " B_plus_1"],
    *,
    options: AttentionOptions,
    is_causal: bool,
) -> Float[Array, "T N H"]:
    """As ``packed_attention``."""
    T, N, H = q.shape
    K = k.shape[1]
    token = jnp.arange(T)
    row = jnp.searchsorted(query_start_loc, token, side="right")
    is_real = token < query_start_loc[-1]
    distance = token[:, None] - token[None, :]
    visible = (row[:, None] == row[None, :]) & is_real[None, :]
    if is_causal:
        visible &= distance >= 0
    if options.sliding_window is not None:
        visible &= jnp.abs(distance) < options.sliding_window
    queries = q.reshape(T, K, N // K, H).astype(jnp.float32)
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
    scores = options.scale * jnp.einsum("QKGH,SKH->KGQS", queries, keys, precision="highest")
    cap = options.logits_soft_cap
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    # where= keeps a token that sees no key at probability 0 instead of NaN.
    probabilities = jax.nn.softmax(scores, axis=-1, where=visible)
    out = jnp.einsum("KGQS,SKH->QKGH", probabilities, values, precision="highest")
    return out.reshape(T, N, H).astype(q.dtype)
