"""Which experts a token goes to, and the order in which their rows are multiplied.

Everything is in float32. Memory is that of a few numbers a token and expert chosen, and of the
scores; nothing has a row for each of a token's possible experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.convert.model_spec import RouterSpec

# Pairs of token and expert up to which places are found by comparing all with all: one small
# kernel, where a sort is several.
MAX_COMPARED = 512
TINY = 1e-20  # keeps a sum of weights from being 0, as DeepSeek has it


class Choice(NamedTuple):
    """The experts of each token, and what each counts."""

    experts: Int[Array, "T k"]
    weights: Float[Array, "T k"]


class Rows(NamedTuple):
    """Pairs of token and expert as rows sorted by expert; R = T * k, those of no expert last.

    Attributes:
        pairs: The pair of each row: t * k + j is the j-th expert of token t.
        places: The row of each pair.
        group_sizes: Rows of each expert.
    """

    pairs: Int[Array, " R"]
    places: Int[Array, "T k"]
    group_sizes: Int[Array, " E"]


def choose_experts(
    logits: Float[Array, "T E"],
    spec: RouterSpec,
    num_chosen: int,
    correction: Float[Array, " E"] | None = None,
) -> Choice:
    """Choose each token's experts; see ``RouterSpec`` for the equations.

    Args:
        logits: In float32.
        spec: How.
        num_chosen: k.
        correction: Added to the scores for the choice alone; None for none.
    """
    if spec.kind == "sparsemixer":
        return _sparsemixer(logits, num_chosen, spec.tolerance)
    if spec.kind == "softmax_chosen":
        largest, experts = jax.lax.top_k(logits, num_chosen)
        return Choice(experts, _scaled(jax.nn.softmax(largest, axis=-1), spec))
    scores = jax.nn.sigmoid(logits) if spec.kind == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    ranked = scores if correction is None else scores + correction
    if spec.num_groups > 1:
        ranked = _within_groups(ranked, spec)
    _, experts = jax.lax.top_k(ranked, num_chosen)
    return Choice(experts, _scaled(jnp.take_along_axis(scores, experts, axis=-1), spec))


def _scaled(weights: Float[Array, "T k"], spec: RouterSpec) -> Float[Array, "T k"]:
    if spec.is_normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + TINY)
    return weights * spec.scale


def _within_groups(ranked: Float[Array, "T E"], spec: RouterSpec) -> Float[Array, "T E"]:
    """The scores of the best groups' experts; all others are below any score."""
    groups = ranked.reshape(ranked.shape[0], spec.num_groups, -1)
    if spec.group_score == "max":
        group_scores = jnp.max(groups, axis=-1)
    else:
        group_scores = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
    _, best = jax.lax.top_k(group_scores, spec.num_chosen_groups)
    is_best = jnp.any(best[:, :, None] == jnp.arange(spec.num_groups), axis=1)
    return jnp.where(is_best[:, :, None], groups, -jnp.inf).reshape(ranked.shape)


def _sparsemixer(logits: Float[Array, "T E"], num_chosen: int, tolerance: float) -> Choice:
    """One expert after the other, each weighed against those that are nearly as good.

    Source: arXiv:2409.12136, as the published model does it where it does not train.
    """
    left, chosen, weights = logits, [], []
    for _ in range(num_chosen):
        best = jnp.argmax(left, axis=-1)
        largest = jnp.max(left, axis=-1, keepdims=True)
        distance = (largest - logits) / jnp.maximum(jnp.abs(logits), largest)
        near = jnp.where(distance > 2 * tolerance, -jnp.inf, left)
        shares = jax.nn.softmax(near, axis=-1)
        chosen.append(best)
        weights.append(jnp.take_along_axis(shares, best[:, None], axis=-1)[:, 0])
        left = jnp.where(jnp.arange(logits.shape[1]) == best[:, None], -jnp.inf, left)
    return Choice(jnp.stack(chosen, axis=1), jnp.stack(weights, axis=1))


def sort_rows(experts: Int[Array, "T k"], is_served: Bool[Array, "T k"], num_experts: int) -> Rows:
    """Sort pairs of token and expert by expert, and by token within one.

    Args:
        experts: Numbers of the experts, from 0.
        is_served: Which pairs count: not those of padding, nor those of another shard's experts.
        num_experts: E.
    """
    flat = jnp.where(is_served, experts, num_experts).reshape(-1).astype(jnp.int32)
    count = flat.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    if count <= MAX_COMPARED:
        is_before = (flat[None, :] < flat[:, None]) | (
            (flat[None, :] == flat[:, None]) & (number[None, :] < number[:, None])
        )
        places = jnp.sum(is_before, axis=1, dtype=jnp.int32)
        order = jnp.zeros(count, jnp.int32).at[places].set(number, unique_indices=True)
    else:
        # Of keys that are all different any sort will do.
        assert (num_experts + 1) * count < 1 << 32, "more pairs than 32 bits can order"
        keys = flat.astype(jnp.uint32) * count + number.astype(jnp.uint32)
        order = (jnp.sort(keys) % count).astype(jnp.int32)
        places = jnp.zeros(count, jnp.int32).at[order].set(number, unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Rows(order, places.reshape(experts.shape), sizes)
