"""Log probabilities of sampled tokens and of prompts, float32, before any edit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.engine.sampling.top_tokens import top_tokens


class TokenLogprobs(NamedTuple):
    """Logprobs of one token per row, and of the most likely ones.

    Attributes:
        logprob: [B] of the row's token.
        rank: [B] int32, 1 + number of tokens that are strictly more likely.
        top_ids: [B, k] int32, most likely first, lower id first among equals; None if the
            logprobs are those of the whole vocabulary.
        top_logprobs: [B, k], or [B, V] in the order of the ids.
        id_logprobs: [B, n] of the ids asked for; None if there are none.
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array | None
    top_logprobs: jax.Array
    id_logprobs: jax.Array | None = None


def token_logprobs(
    logits: Float[Array, "B V"],
    token_ids: Int[Array, " B"],
    num_logprobs: int,
    extra_ids: Int[Array, "B n"] | None = None,
    *,
    normalizes: bool = True,
) -> TokenLogprobs:
    """Compute the logprobs of a token per row and of the most likely tokens.

    Args:
        logits: Logits of any float type; read as float32.
        token_ids: The row's token; one outside the vocabulary reads the nearest inside.
        num_logprobs: How many of the most likely; 0 for none, -1 for the whole vocabulary.
        extra_ids: Further tokens to score.
        normalizes: Give log probabilities; False gives the logits themselves in their place.
    """
    logits = logits.astype(jnp.float32)
    normalizer = jnp.zeros((logits.shape[0], 1), jnp.float32)
    if normalizes:
        normalizer = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1, mode="clip")
    rank = 1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32)
    if num_logprobs == -1:
        values, top_ids = logits, None
    elif num_logprobs == 0:
        empty = (logits.shape[0], 0)
        values, top_ids = jnp.zeros(empty, jnp.float32), jnp.zeros(empty, jnp.int32)
    else:
        values, top_ids = top_tokens(logits, min(num_logprobs, logits.shape[1]))
    extra = None
    if extra_ids is not None:
        extra = jnp.take_along_axis(logits, extra_ids, axis=1, mode="clip") - normalizer
    return TokenLogprobs((chosen - normalizer)[:, 0], rank, top_ids, values - normalizer, extra)


def prompt_logprobs(
    hidden: Float[Array, "T D"],
    next_token_ids: Int[Array, " T"],
    logits_fn: Callable[[Float[Array, "t D"]], Float[Array, "t V"]],
    num_logprobs: int,
    chunk_size: int = 128,
) -> TokenLogprobs:
    """Score the prompt: the logprob of each token given those before it.

    Logits exist for ``chunk_size`` tokens at a time, so the memory does not grow with T.

    Args:
        hidden: Last hidden states of T packed tokens.
        next_token_ids: The token behind each of them in its prompt; 0 where there is none,
            and the result there means nothing.
        logits_fn: The model's output layer.
        num_logprobs: As in ``token_logprobs``; -1 gives back [T, V].
        chunk_size: Tokens per chunk.
    """
    T = hidden.shape[0]
    chunk_size = min(chunk_size, T)
    padding = -T % chunk_size
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk_size, hidden.shape[1])
    targets = jnp.pad(next_token_ids, (0, padding)).reshape(-1, chunk_size)
    score = lambda chunk: token_logprobs(logits_fn(chunk[0]), chunk[1], num_logprobs)  # noqa: E731
    chunks = lax.map(score, (hidden, targets))
    # The number of rows is spelt out: -1 has no meaning for an array without columns.
    return jax.tree.map(lambda x: x.reshape(T + padding, *x.shape[2:])[:T], chunks)
