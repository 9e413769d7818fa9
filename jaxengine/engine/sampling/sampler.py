"""Logits -> token ids, on the device: one pure function, compiled per ``SamplerVariant``.

Order of operations: raw logprobs, float32, masks, allowed tokens, bad words, biases (logit_bias
and min_tokens), penalties, then greedy or temperature, min_p, top_k, top_p and a sample.

The engine dispatches a step before it knows the tokens of the last one. So a row's newest
token may be on the device only, in ``last_tokens[slot]``: it is *pending*, missing in the
history that the host sent, and added here.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxengine.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from jaxengine.engine.sampling.random_stream import gumbel_noise, stream_keys
from jaxengine.engine.sampling.sampling_extras import PROMPT_TOKEN
from jaxengine.engine.sampling.sampling_inputs import (
    FLOAT_FIELDS,
    MAX_SMALL_TOP_K,
    PackedLayout,
    SamplerVariant,
    SamplingRows,
)
from jaxengine.engine.sampling.top_tokens import top_tokens
from jaxengine.engine.sampling.truncation import kept_candidates, order_keys, truncation_threshold
from jaxengine.layers.vocabulary import argmax


class SamplerOutput(NamedTuple):
    """What a step sampled.

    Attributes:
        token_ids: [B] int32; meaningless in rows that do not sample.
        logprobs: Raw logprobs; None if no row wants them.
    """

    token_ids: jax.Array
    logprobs: TokenLogprobs | None


def unpack_rows(packed: Int[Array, " P"], layout: PackedLayout) -> SamplingRows:
    """Cut the packed vector of ``SamplingState.build_rows`` into its fields, inside jit.

    Args:
        packed: The vector, or a longer one that begins with it.
        layout: Static.
    """
    fields = {}
    for name, offset, shape in layout.fields:
        field = lax.slice(packed, (offset,), (offset + math.prod(shape),)).reshape(shape)
        is_float = name in FLOAT_FIELDS
        fields[name] = lax.bitcast_convert_type(field, jnp.float32) if is_float else field
    return SamplingRows(**fields)


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    last_tokens: Int[Array, " S"],
    masks: Int[Array, "M W"] | None = None,
    *,
    variant: SamplerVariant,
) -> tuple[Int[Array, " S"], SamplerOutput]:
    """Choose the next token of each row.

    Args:
        logits: The model's output, any float type.
        rows: The batch's sampling parameters.
        last_tokens: Newest token of every slot. Donate it.
        masks: Bit ``v % 32`` of word ``v // 32`` says whether token ``v`` may be sampled in the
            rows whose ``mask_index`` it is; None if no row has a mask.
        variant: Static: what ``rows`` holds.

    Returns:
        ``last_tokens`` with the new tokens of the rows that sample, and the output.
    """
    edited = edit_logits(logits, rows, last_tokens, variant, masks) if variant.edits else logits
    token_ids = sample_random(edited, rows, variant) if variant.random else argmax(edited)
    logprobs = None
    if variant.logprobs:
        is_processed = variant.logprobs_mode.startswith("processed")
        logprobs = token_logprobs(
            processed_logits(edited, rows, variant) if is_processed else logits,
            token_ids,
            variant.num_logprobs,
            rows.logprob_token_ids,
            normalizes=variant.logprobs_mode.endswith("logprobs"),
        )
    never = last_tokens.shape[0]  # past the end: dropped
    target = jnp.where(rows.samples_token > 0, rows.slot, never)
    last_tokens = last_tokens.at[target].set(token_ids, mode="drop")
    return last_tokens, SamplerOutput(token_ids, logprobs)


@functools.partial(
    jax.jit, static_argnames=("layout", "variant", "sharding"), donate_argnames="last_tokens"
)
def sample_packed(
    logits: Float[Array, "B V"],
    packed: Int[Array, " P"],
    last_tokens: Int[Array, " S"],
    masks: Int[Array, "M W"] | None = None,
    *,
    layout: PackedLayout,
    variant: SamplerVariant,
    sharding: NamedSharding | None = None,
) -> tuple[Int[Array, " S"], SamplerOutput]:
    """Run ``sample`` on a packed vector, jitted; ``last_tokens`` is donated.

    Logits that are cut over devices are first brought into ``sharding``, all on each.
    """
    if sharding is not None:
        logits = lax.with_sharding_constraint(logits, sharding)
    return sample(logits, unpack_rows(packed, layout), last_tokens, masks, variant=variant)


def edit_logits(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    last_tokens: Int[Array, " S"],
    variant: SamplerVariant,
    masks: Int[Array, "M W"] | None = None,
) -> Float[Array, "B V"]:
    """Apply masks, allowed tokens, bad words, biases and penalties, in float32.

    Where bans leave nothing of a row, they do not count there: some token must come, and one that
    is not allowed would be worse than one that is banned. Where the others leave a masked row
    nothing, the mask alone counts: it never leaves nothing, and what it keeps is what the output's
    form allows (``min_tokens`` cannot prolong a JSON object).
    """
    logits = logits.astype(jnp.float32)
    if masks is None:
        return _edit_by_lists(logits, rows, last_tokens, variant)
    is_masked = rows.mask_index < masks.shape[0]
    logits = jnp.where(_allowed_by_masks(masks, rows, logits.shape[1]), logits, -jnp.inf)
    edited = _edit_by_lists(logits, rows, last_tokens, variant)
    has_nothing = is_masked & ~jnp.any(edited > -jnp.inf, axis=1)
    return jnp.where(has_nothing[:, None], logits, edited)


def _allowed_by_masks(
    masks: Int[Array, "M W"], rows: SamplingRows, vocab_size: int
) -> Bool[Array, "B V"]:
    """Unpack each row's mask; rows without one allow everything."""
    words = masks.at[rows.mask_index].get(mode="clip")[:, :, None]  # [B, W, 1]
    bits = (words >> jnp.arange(32)) & 1  # the sign's copies, shifted in, are masked out
    allowed = bits.reshape(words.shape[0], -1)[:, :vocab_size] > 0
    return allowed | (rows.mask_index >= masks.shape[0])[:, None]


def _edit_by_lists(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    last_tokens: Int[Array, " S"],
    variant: SamplerVariant,
) -> Float[Array, "B V"]:
    pending = last_tokens.at[rows.slot].get(mode="clip")  # [B]
    if variant.num_allowed:
        logits = _keep_allowed(logits, rows)
    before_bans = logits
    if variant.num_bad_words:
        logits = _ban_bad_words(logits, rows, pending)
    if variant.num_biases:
        at = logits.at[rows.bias_rows, rows.bias_tokens]
        logits = at.add(rows.bias_values, mode="drop")
    if variant.num_bad_words or variant.num_biases:
        has_any = jnp.max(logits, axis=1, keepdims=True) > -jnp.inf
        logits = jnp.where(has_any, logits, before_bans)
    if variant.num_history:
        logits = _apply_penalties(logits, rows, pending)
    return logits


def _keep_allowed(logits: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    everything = jnp.broadcast_to(rows.has_allowed[:, None] == 0, logits.shape)
    allowed = everything.at[rows.allowed_rows, rows.allowed_tokens].set(True, mode="drop")
    return jnp.where(allowed, logits, -jnp.inf)


def _ban_bad_words(
    logits: Float[Array, "B V"], rows: SamplingRows, pending: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Ban the last token of each bad word whose other tokens have just been generated."""
    newest = pending.at[rows.bad_rows].get(mode="clip")
    is_complete = (rows.bad_previous == -1) | (rows.bad_previous == newest)
    target_rows = jnp.where(is_complete, rows.bad_rows, logits.shape[0])
    return logits.at[target_rows, rows.bad_tokens].set(-jnp.inf, mode="drop")


def _apply_penalties(
    logits: Float[Array, "B V"], rows: SamplingRows, pending: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Repetition, then frequency and presence, from one count per token.

    An occurrence in the output counts 1, in the prompt PROMPT_TOKEN (once at most).
    """
    counts = jnp.zeros(logits.shape, jnp.int32)
    counts = counts.at[rows.history_rows, rows.history_tokens].add(rows.history_values, mode="drop")
    row_ids = jnp.arange(logits.shape[0])
    counts = counts.at[row_ids, pending].add(rows.has_pending, mode="drop")
    penalty = jnp.where(counts > 0, rows.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    num_outputs = counts % PROMPT_TOKEN
    logits = logits - rows.frequency[:, None] * num_outputs
    return logits - jnp.where(num_outputs > 0, rows.presence[:, None], 0.0)


def processed_logits(
    edited: Float[Array, "B V"], rows: SamplingRows, variant: SamplerVariant
) -> Float[Array, "B V"]:
    """Return the logits that a token is sampled from: at its temperature, -inf if truncated."""
    edited = edited.astype(jnp.float32)
    if not variant.random:
        return edited
    temperature = _divisor(rows)
    kept = jnp.ones(edited.shape, bool)
    if variant.truncation:
        threshold = truncation_threshold(
            edited, temperature, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p
        )
        is_greedy = rows.temperature[:, None] == 0
        kept = (order_keys(edited) >= threshold[:, None]) | is_greedy
    return jnp.where(kept, edited / temperature[:, None], -jnp.inf)


def sample_random(
    logits: Float[Array, "B V"], rows: SamplingRows, variant: SamplerVariant
) -> Int[Array, " B"]:
    """Sample each row at its temperature from what top_k, top_p and min_p keep of it.

    The Gumbel-max trick: the largest of logit / temperature + noise is a sample. A greedy
    row is one without noise.
    """
    logits = logits.astype(jnp.float32)
    keys = stream_keys(rows.seed_high, rows.seed_low, rows.position)
    if variant.only_small_top_k:
        return _sample_best(logits, rows, keys)
    temperature = _divisor(rows)
    token_ids = lax.broadcasted_iota(jnp.uint32, logits.shape, 1)
    scores = _scores(logits, token_ids, rows, keys)
    if variant.top_k or variant.top_p or variant.min_p:
        top_k = rows.top_k if variant.top_k else None
        threshold = truncation_threshold(
            logits, temperature, top_k=top_k, top_p=rows.top_p, min_p=rows.min_p
        )
        scores = jnp.where(order_keys(logits) >= threshold[:, None], scores, -jnp.inf)
    sampled = argmax(scores)
    if not variant.small_top_k:
        return sampled
    is_small = (rows.top_k > 0) & (rows.top_k <= MAX_SMALL_TOP_K)
    return jnp.where(is_small, _sample_best(logits, rows, keys), sampled)


def _sample_best(
    logits: Float[Array, "B V"], rows: SamplingRows, keys: UInt[Array, "B 2"]
) -> Int[Array, " B"]:
    """Sample rows with a small top_k, and greedy ones, from their best tokens only."""
    values, token_ids = top_tokens(logits, min(MAX_SMALL_TOP_K, logits.shape[1]))
    top_k = jnp.where(rows.temperature > 0, rows.top_k, 1)
    kept = kept_candidates(values, _divisor(rows), top_k, top_p=rows.top_p, min_p=rows.min_p)
    scores = _scores(values, token_ids.astype(jnp.uint32), rows, keys)
    scores = jnp.where(kept, scores, -jnp.inf)
    is_largest = kept & (scores == jnp.max(scores, axis=1, keepdims=True))
    return jnp.min(jnp.where(is_largest, token_ids, logits.shape[1] - 1), axis=1)


def _scores(
    logits: Float[Array, "B C"],
    token_ids: UInt[Array, "B C"],
    rows: SamplingRows,
    keys: UInt[Array, "B 2"],
) -> Float[Array, "B C"]:
    """What the sampled token has most of: logit / temperature + noise; greedy rows have none."""
    noise = jnp.where(rows.temperature[:, None] > 0, gumbel_noise(keys, token_ids), 0.0)
    return logits / _divisor(rows)[:, None] + noise


def _divisor(rows: SamplingRows) -> Float[Array, " B"]:
    return jnp.where(rows.temperature > 0, rows.temperature, 1.0)
