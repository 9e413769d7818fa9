"""top_k, top_p and min_p without sorting the vocabulary.

All three keep the tokens whose logit reaches a threshold. The thresholds of top_k and
top_p are found by bisection over the 32 bits of an order-preserving integer view of
the float32 logits, so they are exact, and cost a fixed number of passes over [B, V].
Tokens equal to the threshold are all kept, so that ties never depend on their order.

A small top_k needs none of that: its few best tokens are found in one pass, sorted, and
cut by ``kept_candidates``. There exactly top_k are kept, of equals those with the lowest ids.

Probabilities are summed as integers: the sum is the same in any order, so that a row
is cut alike in every batch, whatever shape XLA tiles its reductions for.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOWEST_KEY = -(2**31)
MASS_BITS = 30  # a probability is a multiple of 2**-30; a row's sum stays below 2**31


def order_keys(logits: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """View float32 as int32 so that integers compare as the floats do (0.0 equals -0.0)."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0.0, 0.0, logits), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def largest_threshold(
    keys: Int[Array, "B V"], weights: Int[Array, "B V"] | None, targets: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Find the largest threshold at or above which enough weight lies.

    Args:
        keys: Order keys of the logits.
        weights: Non-negative weight of each token, a row's sum below 2**31; None counts
            tokens.
        targets: Weight to reach.

    Returns:
        The largest t with sum(weights[keys >= t]) >= target; the lowest key if there is none.
    """
    # A GPU pass costs its memory traffic, so it settles 4 bits by comparing with 15 keys at
    # once; a CPU pass costs its arithmetic, which bit by bit is least.
    search = functools.partial(_search, keys, weights, targets)
    return lax.platform_dependent(
        cpu=functools.partial(search, 1), default=functools.partial(search, 4)
    )


def _search(
    keys: Int[Array, "B V"],
    weights: Int[Array, "B V"] | None,
    targets: Int[Array, " B"],
    bits_per_pass: int,
) -> Int[Array, " B"]:
    def reached(threshold: Int[Array, " B"]) -> Int[Array, " B"]:
        at_or_above = keys >= threshold[:, None]
        counted = jnp.where(at_or_above, 1 if weights is None else weights, 0)
        return (jnp.sum(counted, axis=1) >= targets).astype(jnp.int32)

    def settle_bits(index: Int[Array, ""], threshold: Int[Array, " B"]) -> Int[Array, " B"]:
        # Integer overflow wraps, so that the first bit moves from -2**31 to 0.
        step = jnp.int32(1) << (32 - bits_per_pass * (index + 1))
        candidates = range(1, 2**bits_per_pass)
        return threshold + step * sum(reached(threshold + step * c) for c in candidates)

    lowest = jnp.full(keys.shape[:1], LOWEST_KEY, jnp.int32)
    return lax.fori_loop(0, 32 // bits_per_pass, settle_bits, lowest)


def integer_probabilities(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"]
) -> Int[Array, "B V"]:
    """Return softmax(logits / temperature) in units of 2**-MASS_BITS, up to rounding.

    A row sums to about 2**MASS_BITS. Every step is elementwise or a sum of integers.
    """
    highest = jnp.max(logits, axis=1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    relative = jnp.exp((logits - highest) / temperature[:, None])  # in [0, 1]
    # 24 bits each, summed as two halves of 12: neither sum can overflow below V = 2**19.
    fixed = (relative * 2.0**24).astype(jnp.int32)
    high = jnp.sum(fixed >> 12, axis=1, keepdims=True).astype(jnp.float32)
    low = jnp.sum(fixed & 0xFFF, axis=1, keepdims=True).astype(jnp.float32)
    total = high * 2.0**-12 + low * 2.0**-24
    return jnp.round(relative / jnp.maximum(total, 2.0**-24) * 2.0**MASS_BITS).astype(jnp.int32)


def truncation_threshold(
    logits: Float[Array, "B V"],
    temperature: Float[Array, " B"],
    *,
    top_k: Int[Array, " B"] | None = None,
    top_p: Float[Array, " B"] | None = None,
    min_p: Float[Array, " B"] | None = None,
) -> Int[Array, " B"]:
    """Return the order key that a token must reach to be kept.

    min_p and top_k cut the distribution at the row's temperature; top_p cuts what is
    left of it after them.

    Args:
        logits: float32 logits, not yet divided by the temperature.
        temperature: Above 0.
        top_k: 0 keeps all. None: no row uses it; the same for the others.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
    """
    keys = order_keys(logits)
    threshold = jnp.full(keys.shape[:1], LOWEST_KEY, jnp.int32)
    if min_p is not None:
        threshold = order_keys(jnp.max(logits, axis=1) + temperature * jnp.log(min_p))
    if top_k is not None:
        counts = jnp.where(top_k > 0, top_k, keys.shape[1])
        threshold = jnp.maximum(threshold, largest_threshold(keys, None, counts))
    if top_p is not None:
        kept = keys >= threshold[:, None]
        mass = jnp.where(kept, integer_probabilities(logits, temperature), 0)
        cut = largest_threshold(keys, mass, _target_mass(mass, top_p))
        threshold = jnp.where(top_p < 1.0, jnp.maximum(threshold, cut), threshold)
    return threshold


def kept_candidates(
    values: Float[Array, "B C"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    *,
    top_p: Float[Array, " B"] | None = None,
    min_p: Float[Array, " B"] | None = None,
) -> Bool[Array, "B C"]:
    """Return which of a row's best tokens min_p, top_k and top_p keep.

    Args:
        values: Their float32 logits, largest first.
        temperature: Above 0.
        top_k: Between 1 and C.
        top_p: 1 keeps all. None: no row uses it; the same for min_p.
        min_p: 0 keeps all.
    """
    kept = lax.broadcasted_iota(jnp.int32, values.shape, 1) < top_k[:, None]
    if min_p is not None:
        kept &= values >= values[:, :1] + (temperature * jnp.log(min_p))[:, None]
    if top_p is not None:
        mass = integer_probabilities(jnp.where(kept, values, -jnp.inf), temperature)
        mass_before = jnp.cumsum(mass, axis=1) - mass
        kept &= (mass_before < _target_mass(mass, top_p)[:, None]) | (top_p >= 1.0)[:, None]
    return kept


def _target_mass(mass: Int[Array, "B V"], top_p: Float[Array, " B"]) -> Int[Array, " B"]:
    total = jnp.sum(mass, axis=1).astype(jnp.float32)
    return jnp.maximum(jnp.ceil(total * top_p), 1.0).astype(jnp.int32)
