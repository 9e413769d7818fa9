"""Routing equals a loop over tokens, experts and groups."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.convert.model_spec import RouterSpec

from jaxengine.layers import routing
from jaxengine.layers.routing import choose_experts, sort_rows

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((7, 12)).astype(np.float32)
CORRECTION = RNG.standard_normal(12).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def chosen(ranked: np.ndarray, count: int) -> list[int]:
    return [int(e) for e in np.argsort(-ranked, kind="stable")[:count]]


def expected(spec: RouterSpec, count: int) -> list[dict[int, float]]:
    """Experts and weights of each token."""
    tokens = []
    for logits in LOGITS.astype(np.float64):
        if spec.kind == "softmax_chosen":
            experts = chosen(logits, count)
            weights = softmax(logits[experts])
        else:
            scores = 1 / (1 + np.exp(-logits)) if spec.kind == "sigmoid" else softmax(logits)
            ranked = scores + CORRECTION if spec.has_correction else scores.copy()
            if spec.num_groups > 1:
                ranked = without_bad_groups(ranked, spec)
            experts = chosen(ranked, count)
            weights = scores[experts]
        if spec.is_normalised:
            weights = weights / weights.sum()
        tokens.append(dict(zip(experts, weights * spec.scale, strict=True)))
    return tokens


def without_bad_groups(ranked: np.ndarray, spec: RouterSpec) -> np.ndarray:
    groups = np.split(ranked, spec.num_groups)
    best_of = 1 if spec.group_score == "max" else 2
    group_scores = np.array([np.sort(group)[-best_of:].sum() for group in groups])
    good = chosen(group_scores, spec.num_chosen_groups)
    kept = [g if number in good else g - np.inf for number, g in enumerate(groups)]
    return np.concatenate(kept)


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(),
        RouterSpec(is_normalised=True, scale=2.5),
        RouterSpec("softmax_chosen"),
        RouterSpec("sigmoid", is_normalised=True),
        RouterSpec(num_groups=4, num_chosen_groups=2, scale=16.0),
        RouterSpec(
            "sigmoid",
            is_normalised=True,
            scale=2.5,
            has_correction=True,
            num_groups=4,
            num_chosen_groups=2,
            group_score="top2",
        ),
    ],
    ids=lambda spec: f"{spec.kind}, {spec.num_groups} groups, {spec.scale}",
)
def test_experts_and_weights_are_those_of_a_loop(spec: RouterSpec) -> None:
    correction = jnp.asarray(CORRECTION) if spec.has_correction else None
    choice = choose_experts(jnp.asarray(LOGITS), spec, 3, correction)
    for token, own in enumerate(expected(spec, 3)):
        found = dict(
            zip(choice.experts[token].tolist(), choice.weights[token].tolist(), strict=True)
        )
        assert found.keys() == own.keys()
        assert np.allclose([found[e] for e in own], list(own.values()), rtol=1e-5)


def test_sparsemixer_weighs_an_expert_against_those_that_are_nearly_as_good() -> None:
    logits = jnp.asarray([[2.0, 1.99, 1.0, 0.5]])
    choice = choose_experts(logits, RouterSpec("sparsemixer", tolerance=0.01), 2)
    assert choice.experts.tolist() == [[0, 1]]
    # Of the first two, both within 2 % of the largest; then the second alone.
    first = 1 / (1 + np.exp(-0.01))
    assert choice.weights.tolist() == [[pytest.approx(first), 1.0]]


@pytest.mark.parametrize("max_compared", [0, 1000], ids=["sorted", "compared"])
def test_rows_are_sorted_by_expert_and_lead_back_to_their_pairs(
    max_compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "MAX_COMPARED", max_compared)
    experts = np.array([[1, 4], [0, 1], [4, 2], [1, 0]])
    is_served = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)  # seven of eight pairs
    rows = sort_rows(jnp.asarray(experts), jnp.asarray(is_served), 5)
    assert rows.group_sizes.tolist() == [2, 2, 1, 0, 2]
    assert rows.pairs.tolist() == [2, 7, 0, 6, 5, 1, 4, 3]  # expert 0's first, padding last
    assert rows.places.reshape(-1)[rows.pairs].tolist() == list(range(8))
