"""The sampler against plain numpy written from the definitions, on the CPU."""

import functools
from array import array
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.engine.sampling.logprobs import prompt_logprobs, token_logprobs
from jaxengine.engine.sampling.random_stream import gumbel_noise, stream_keys
from jaxengine.engine.sampling.sampler import sample_packed
from jaxengine.engine.sampling.sampling_inputs import GREEDY, SamplingState
from jaxengine.engine.sampling.top_tokens import top_tokens
from jaxengine.engine.sampling.truncation import kept_candidates, order_keys, truncation_threshold
from jaxengine.layers.vocabulary import argmax
from jaxengine.sampling_params import SamplingParams

V = 300


def make_row(slot=0, prompt=(1,), output=(), num_pending=0, samples=True):
    """A scheduled row whose request knows prompt and output, plus pending tokens."""
    known = array("i", [*prompt, *output])
    request = SimpleNamespace(slot=slot, all_token_ids=known, num_prompt_tokens=len(prompt))
    return SimpleNamespace(
        request=request,
        num_scheduled_tokens=1,
        num_computed_tokens=len(known) + num_pending - 1,
        samples_token=samples,
    )


def run(logits, requests, *, last_tokens=None, num_rows=None, num_slots=32, end=frozenset()):
    """Sample once. ``requests``: (SamplingParams, seed, row) each; returns last tokens, output."""
    vocab_size = logits.shape[1]
    state = SamplingState(num_slots, vocab_size)
    for params, seed, row in requests:
        prompt = row.request.all_token_ids[: row.request.num_prompt_tokens]
        state.set_slot(row.request.slot, params, seed, prompt, end)
    num_rows = num_rows or len(requests)
    variant, layout, packed = state.build_rows([row for *_, row in requests], num_rows)
    padded = np.zeros((num_rows, vocab_size), logits.dtype)
    padded[: len(logits)] = logits
    last_tokens = jnp.zeros(num_slots, jnp.int32) if last_tokens is None else last_tokens
    return sample_packed(
        jnp.asarray(padded), jnp.asarray(packed), last_tokens, layout=layout, variant=variant
    )


def sample_one(logits, params, *, seed=0, row=None, **kwargs):
    _, output = run(np.asarray(logits)[None], [(params, seed, row or make_row())], **kwargs)
    return int(output.token_ids[0])


def random_logits(num_rows, vocab_size=V, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


GREEDY_PARAMS = SamplingParams(temperature=0)


# Greedy.


def test_a_greedy_batch_compiles_to_the_bare_variant() -> None:
    state = SamplingState(4, V)
    state.set_slot(0, GREEDY_PARAMS, seed=1)
    variant, layout, _ = state.build_rows([make_row()], 8)
    assert variant == GREEDY
    assert [name for name, *_ in layout.fields] == ["slot", "samples_token"]


def test_greedy_takes_the_largest_logit_and_the_lowest_id_of_equals() -> None:
    logits = np.zeros((2, V), np.float32)
    logits[0, [7, 9]] = 2.0
    _, output = run(logits, [(GREEDY_PARAMS, 0, make_row(slot)) for slot in (0, 1)])
    assert output.token_ids.tolist() == [7, 0]
    assert output.logprobs is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_argmax_agrees_with_numpy(dtype) -> None:
    x = jnp.asarray(random_logits(5), dtype)
    np.testing.assert_array_equal(argmax(x), np.argmax(np.asarray(x, np.float32), axis=1))


def test_a_row_that_does_not_sample_leaves_the_last_token_alone() -> None:
    logits = np.zeros((2, V), np.float32)
    logits[:, 5] = 1.0
    rows = [make_row(slot=3), make_row(slot=4, samples=False)]
    last_tokens, _ = run(
        logits, [(GREEDY_PARAMS, 0, row) for row in rows], last_tokens=jnp.full(32, 99), num_rows=4
    )
    assert last_tokens[3] == 5
    assert np.count_nonzero(np.asarray(last_tokens) != 99) == 1


# The random stream.


def test_a_row_samples_the_same_token_alone_and_anywhere_in_any_batch() -> None:
    logits = random_logits(7, 1000, scale=1.0)
    params = [
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=1.2, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.8, min_p=0.01),
        GREEDY_PARAMS,
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=1.5, frequency_penalty=0.5),
        SamplingParams(temperature=2.0, top_k=1000),
    ]
    alone = [sample_one(logits[i], params[i], seed=i) for i in range(7)]
    for order in (range(7), [6, 5, 4, 3, 2, 1, 0], [3, 2]):
        requests = [(params[i], i, make_row(slot)) for slot, i in enumerate(order)]
        _, output = run(logits[list(order)], requests, num_rows=8)
        assert output.token_ids[: len(order)].tolist() == [alone[i] for i in order]


def test_the_noise_depends_on_both_seed_words_and_on_the_position() -> None:
    ids = jnp.arange(V, dtype=jnp.uint32)[None]
    seen = {
        np.asarray(gumbel_noise(stream_keys(*(jnp.array([x]) for x in key)), ids)).tobytes()
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (1, 1, 1)]
    }
    assert len(seen) == 6


def test_the_noise_has_the_mean_and_variance_of_a_gumbel_distribution() -> None:
    keys = stream_keys(jnp.zeros(64, jnp.int32), jnp.arange(64), jnp.arange(64))
    ids = jnp.broadcast_to(jnp.arange(4096, dtype=jnp.uint32), (64, 4096))
    noise = np.asarray(gumbel_noise(keys, ids), np.float64)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.57722) < 0.01  # 262144 draws: standard error 0.0025
    assert abs(noise.var() - np.pi**2 / 6) < 0.02
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.7}, {"temperature": 0.6}])
def test_sampled_frequencies_follow_the_truncated_softmax(params) -> None:
    params = SamplingParams(**params)
    logits = random_logits(1, 16, scale=1.5, seed=3)[0]
    expected = reference_probabilities(logits, params)
    num_draws = 4096
    state = SamplingState(num_draws, 16)
    rows = [make_row(slot, prompt=[1] * (slot + 1)) for slot in range(num_draws)]
    for slot in range(num_draws):
        state.set_slot(slot, params, seed=7)
    variant, layout, packed = state.build_rows(rows, num_draws)
    tiled = jnp.tile(jnp.asarray(logits), (num_draws, 1))
    last = jnp.zeros(num_draws, jnp.int32)
    _, output = sample_packed(tiled, jnp.asarray(packed), last, layout=layout, variant=variant)
    counts = np.bincount(np.asarray(output.token_ids), minlength=16)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - num_draws * expected) ** 2)[kept] / (num_draws * expected[kept])
    assert chi_square.sum() < 45  # 15 degrees of freedom: exceeded once in 13,000 seeds


# Truncation.


def reference_kept(logits, params):
    """Sort, then cut: which tokens min_p, top_k and top_p leave, ties at the cut included."""
    x = logits.astype(np.float64) / params.temperature
    p = np.exp(x - x.max())
    kept = p >= params.min_p
    if params.top_k:
        kept &= x >= np.sort(x)[-min(params.top_k, len(x))]
    if params.top_p < 1.0:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum((p * kept)[order]) / (p * kept).sum()
        last = min(np.searchsorted(mass, params.top_p), len(x) - 1)
        kept &= x >= x[order[last]]
    return kept


def reference_probabilities(logits, params):
    x = np.where(reference_kept(logits, params), logits / params.temperature, -np.inf)
    p = np.exp(x - x.max())
    return p / p.sum()


def kept_tokens(logits, params):
    rows = len(logits)
    full = functools.partial(jnp.full, rows)
    threshold = jax.jit(truncation_threshold)(
        jnp.asarray(logits),
        full(params.temperature, dtype=jnp.float32),
        top_k=full(params.top_k),
        top_p=full(params.top_p, dtype=jnp.float32),
        min_p=full(params.min_p, dtype=jnp.float32),
    )
    return np.asarray(order_keys(jnp.asarray(logits)) >= threshold[:, None])


CUTS = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 50},
    {"top_k": V},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 0.3},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.7},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_truncation_keeps_what_sorting_keeps(cut) -> None:
    scales = np.repeat(np.float32([0.01, 1.0, 3.0, 100.0]), 3)[:, None]
    logits = random_logits(12, scale=1.0) * scales
    params = SamplingParams(**cut)
    expected = np.stack([reference_kept(row, params) for row in logits])
    np.testing.assert_array_equal(kept_tokens(logits, params), expected)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_truncation_keeps_what_sorting_keeps_with_masked_and_tied_logits(cut) -> None:
    logits = np.round(random_logits(8, scale=2.0, seed=5))  # many ties
    logits[:, ::3] = -np.inf
    logits[1] = 4.0  # all equal
    logits[2] = -np.inf
    logits[2, 17] = -3e38  # one left, extreme
    logits[3, 5] = 3e38
    params = SamplingParams(**cut)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.stack([reference_kept(row, params) for row in logits])
    possible = np.isfinite(logits)  # whether an impossible token is "kept" does not matter
    np.testing.assert_array_equal((kept_tokens(logits, params) & possible), expected & possible)


SMALL_CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 64, "top_p": 0.7},
    {"top_k": 40, "top_p": 1e-6},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.7},
]


@pytest.mark.parametrize("cut", SMALL_CUTS, ids=str)
def test_a_small_top_k_keeps_a_prefix_of_the_stable_sort(cut) -> None:
    logits = np.round(random_logits(8, scale=2.0, seed=5) * 4) / 4  # some ties
    logits[1] = 4.0
    logits[2, 1:] = -np.inf
    params = SamplingParams(**cut)
    values, ids = top_tokens(jnp.asarray(logits), 64)
    full = functools.partial(jnp.full, 8)
    kept = jax.jit(kept_candidates)(
        values,
        full(params.temperature, dtype=jnp.float32),
        full(params.top_k),
        top_p=full(params.top_p, dtype=jnp.float32),
        min_p=full(params.min_p, dtype=jnp.float32),
    )
    for row, row_ids, row_kept in zip(logits, np.asarray(ids), np.asarray(kept), strict=True):
        expected = reference_prefix(row, params)
        possible = np.isfinite(row[row_ids])
        assert row_ids[row_kept & possible].tolist() == expected


def reference_prefix(logits, params):
    """Token ids in the order of likelihood, lowest id first among equals, cut to size."""
    order = np.argsort(-logits, kind="stable")[: params.top_k]
    x = logits[order].astype(np.float64) / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p] = 0
    num_kept = np.searchsorted(np.cumsum(p) / p.sum(), params.top_p * (1 - 1e-9)) + 1
    return order[:num_kept][p[:num_kept] > 0].tolist()


def test_both_search_widths_find_the_same_threshold() -> None:
    from jaxengine.engine.sampling import truncation

    keys = order_keys(jnp.asarray(random_logits(4)))
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (4, V)), jnp.int32)
    for w in (None, weights):
        targets = jnp.array([1, 7, 100, 299])
        narrow = truncation._search(keys, w, targets, 1)
        np.testing.assert_array_equal(narrow, truncation._search(keys, w, targets, 4))


def test_top_k_one_is_greedy_at_any_temperature() -> None:
    logits = random_logits(1)[0]
    params = SamplingParams(temperature=2.0, top_k=1)
    assert sample_one(logits, params, seed=9) == np.argmax(logits)


# Edits, with the newest token known to the host and pending on the device.


def run_both_ways(logits, params, prompt, output, **kwargs):
    """Greedy token when the host knows all output tokens, and when the last is pending."""
    known = make_row(slot=2, prompt=prompt, output=output)
    pending = make_row(slot=2, prompt=prompt, output=output[:-1], num_pending=1)
    last = lambda: jnp.full(32, 250).at[2].set(output[-1])  # noqa: E731
    tokens = {
        sample_one(logits, params, row=row, last_tokens=last(), **kwargs)
        for row in (known, pending)
    }
    assert len(tokens) == 1, "known and pending tokens must count alike"
    return tokens.pop()


def logits_with(**values):
    logits = np.full(V, -10.0, np.float32)
    for name, value in values.items():
        logits[int(name[1:])] = value
    return logits


def test_frequency_penalty_counts_every_output_token() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    logits = logits_with(t5=5.0, t6=2.5)
    assert run_both_ways(logits, params, [5, 5, 5], [5, 5]) == 5  # 5 - 2 > 2.5
    assert run_both_ways(logits, params, [1], [5, 5, 5]) == 6


def test_presence_penalty_counts_an_output_token_once() -> None:
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    logits = logits_with(t5=5.0, t6=2.9)
    assert run_both_ways(logits, params, [5], [5, 5, 5]) == 5
    assert run_both_ways(logits_with(t5=5.0, t6=3.1), params, [1], [5]) == 6


def test_repetition_penalty_covers_prompt_and_output_and_both_signs() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert run_both_ways(logits_with(t5=5.0, t6=2.6), params, [5], [1]) == 6
    assert run_both_ways(logits_with(t5=5.0, t6=2.6), params, [1], [5]) == 6
    assert run_both_ways(logits_with(t5=5.0, t6=2.4), params, [5, 5], [5, 5]) == 5
    negative = np.full(V, -9.0, np.float32)
    negative[[5, 6]] = -1.0, -1.9
    assert run_both_ways(negative, params, [1], [5]) == 6


def test_logit_bias_is_added_once_per_token() -> None:
    params = SamplingParams(temperature=0, logit_bias={"5": 3.0, 6: -100})
    assert sample_one(logits_with(t5=1.0, t6=50.0, t7=3.9), params) == 5
    assert sample_one(logits_with(t5=1.0, t6=50.0, t7=4.1), params) == 7


def test_min_tokens_masks_the_end_tokens_until_enough_are_there() -> None:
    params = SamplingParams(temperature=0, min_tokens=2)
    logits = logits_with(t5=5.0, t6=1.0)
    end = frozenset([5])
    assert sample_one(logits, params, end=end, row=make_row()) == 6
    assert run_both_ways(logits, params, [1], [9], end=end) == 6
    assert run_both_ways(logits, params, [1], [9, 9], end=end) == 5


def test_only_allowed_tokens_are_sampled_and_only_in_their_row() -> None:
    logits = np.tile(logits_with(t5=5.0, t6=1.0, t7=0.5), (2, 1))
    only = SamplingParams(temperature=0, allowed_token_ids=[6, 7])
    _, output = run(logits, [(only, 0, make_row(0)), (GREEDY_PARAMS, 0, make_row(1))], num_rows=4)
    assert output.token_ids[:2].tolist() == [6, 5]


def bad_words(*words):
    return SamplingParams(temperature=0, bad_words_token_ids=[list(word) for word in words])


def test_a_bad_word_of_one_token_is_always_masked() -> None:
    assert sample_one(logits_with(t5=5.0, t6=1.0), bad_words([5])) == 6


def test_the_last_token_of_a_bad_word_is_masked_only_behind_the_others() -> None:
    logits = logits_with(t5=5.0, t6=1.0)
    assert run_both_ways(logits, bad_words([8, 9, 5]), [1], [8, 9]) == 6
    assert run_both_ways(logits, bad_words([8, 9, 5]), [1], [8, 8]) == 5
    assert run_both_ways(logits, bad_words([8, 9, 5]), [1], [9, 9]) == 5
    assert run_both_ways(logits, bad_words([9, 5]), [1], [9]) == 6
    assert run_both_ways(logits, bad_words([8, 9, 5]), [8], [9]) == 5  # the prompt does not count


@pytest.mark.parametrize(
    "bans",
    [
        {"bad_words_token_ids": [[6], [7]]},
        {"min_tokens": 2, "logit_bias": {6: -100, 7: -100}},
        {"bad_words_token_ids": [[6]], "min_tokens": 1, "presence_penalty": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_k": 3}, {"seed": 1, "top_p": 0.5}]
)
def test_bans_that_leave_nothing_of_the_allowed_tokens_do_not_count(how, bans) -> None:
    logits = np.tile(logits_with(t5=5.0, t6=1.0, t7=0.5), (2, 1))
    params = SamplingParams(allowed_token_ids=[6, 7], **how, **bans)
    requests = [(params, 1, make_row(0)), (bad_words([5]), 0, make_row(1))]
    _, output = run(logits, requests, end=frozenset([6, 7]))
    assert int(output.token_ids[0]) in (6, 7)
    assert int(output.token_ids[1]) == 6


def test_edits_of_one_row_leave_the_others_alone() -> None:
    logits = np.tile(logits_with(t5=5.0, t6=1.0), (3, 1))
    edits = SamplingParams(
        temperature=0, frequency_penalty=2, logit_bias={5: -10}, bad_words_token_ids=[[5]]
    )
    rows = [make_row(slot, output=[5, 5, 5]) for slot in range(3)]
    requests = [(edits if i == 1 else GREEDY_PARAMS, 0, row) for i, row in enumerate(rows)]
    _, output = run(logits, requests, num_rows=8)
    assert output.token_ids[:3].tolist() == [5, 6, 5]


# Logprobs.


def reference_logprobs(logits):
    x = logits.astype(np.float64)
    return x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1)[:, None]


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    logits = random_logits(3)
    best = np.argsort(-logits[1])
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={int(best[4]): 100.0})
    requests = [(params if i == 1 else GREEDY_PARAMS, 0, make_row(i)) for i in range(3)]
    _, output = run(logits, requests)
    expected = reference_logprobs(logits)
    assert output.token_ids[1] == best[4]
    assert output.logprobs.rank[1] == 5
    np.testing.assert_allclose(output.logprobs.logprob[1], expected[1, best[4]], atol=1e-5)
    np.testing.assert_array_equal(output.logprobs.top_ids[1, :3], best[:3])
    np.testing.assert_allclose(
        output.logprobs.top_logprobs[1, :3], expected[1, best[:3]], atol=1e-5
    )


def test_minus_one_gives_the_logprobs_of_the_whole_vocabulary() -> None:
    logits = random_logits(2)
    _, output = run(
        logits, [(SamplingParams(temperature=0, logprobs=-1), 0, make_row(i)) for i in (0, 1)]
    )
    assert output.logprobs.top_ids is None
    np.testing.assert_allclose(output.logprobs.top_logprobs, reference_logprobs(logits), atol=1e-5)


def test_the_logprobs_of_given_tokens_are_returned() -> None:
    logits = random_logits(1)
    params = SamplingParams(temperature=0, logprob_token_ids=[4, 200])
    _, output = run(logits, [(params, 0, make_row())])
    expected = reference_logprobs(logits)[0, [4, 200]]
    np.testing.assert_allclose(output.logprobs.id_logprobs[0, :2], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("k", "vocab_size"), [(1, 5000), (5, 5001), (20, 9000), (20, 25), (3, 129)]
)
def test_top_tokens_equals_a_stable_sort_even_with_ties(k, vocab_size) -> None:
    x = np.round(random_logits(6, vocab_size, scale=1.0))
    x[2] = 0.0
    x[3] = -np.inf
    values, ids = top_tokens(jnp.asarray(x), k)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, 1))


def test_prompt_logprobs_do_not_depend_on_the_chunks() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((37, 8)).astype(np.float32)
    weight = jnp.asarray(rng.standard_normal((8, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, 37), jnp.int32)
    score = functools.partial(prompt_logprobs, jnp.asarray(hidden), targets, lambda h: h @ weight)
    whole = token_logprobs(hidden @ weight, targets, 4)
    for chunk_size in (1, 10, 128):
        chunked = jax.jit(functools.partial(score, 4, chunk_size=chunk_size))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked, whole)
    expected = reference_logprobs(np.asarray(hidden @ weight))
    np.testing.assert_allclose(whole.logprob, expected[np.arange(37), targets], atol=1e-5)


# Packing.


def test_list_sizes_are_bucketed_so_that_growing_outputs_do_not_compile_anew() -> None:
    state = SamplingState(4, V)
    state.set_slot(0, SamplingParams(temperature=0, frequency_penalty=1), 0, [1])
    variants = {state.build_rows([make_row(output=[3] * n)], 4)[0] for n in (0, 1, 9, 255)}
    assert len(variants) == 1


def test_a_slot_forgets_the_request_before() -> None:
    state = SamplingState(4, V)
    state.set_slot(0, SamplingParams(logit_bias={3: 5.0}, top_k=3, logprobs=2), 0)
    state.set_slot(0, GREEDY_PARAMS, 0)
    assert state.build_rows([make_row()], 1)[0] == GREEDY


@pytest.mark.parametrize(
    "other",
    [{"temperature": 0.5}, {"logprobs": 0}, {"logit_bias": {3: 1.0}}, {"frequency_penalty": 0.1}],
)
def test_one_row_that_is_not_plain_is_noticed(other: dict) -> None:
    state = SamplingState(4, V)
    for slot in range(3):
        params = SamplingParams(**{"temperature": 0, **(other if slot == 1 else {})})
        state.set_slot(slot, params, 0)
    assert state.build_rows([make_row(slot) for slot in range(3)], 4)[0] != GREEDY
    assert state.build_rows([make_row(slot) for slot in (0, 2)], 4)[0] == GREEDY


def test_seeds_of_64_bits_differ_in_either_half() -> None:
    state = SamplingState(4, V)
    packed = []
    for seed in (0, 1, 1 << 32, -1, 2**63):
        state.set_slot(0, SamplingParams(), seed)
        packed.append(state.build_rows([make_row()], 1)[2].tobytes())
    assert len(set(packed)) == 5
