import numpy as np
import pytest

from jaxengine.sampling_params import RequestOutputKind, SamplingParams


def test_the_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (16, 0, None)
    assert (params.stop, params.stop_token_ids, params.detokenize) == ([], [], True)
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert repr(params) == "SamplingParams()"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 16385}, "at most 16384"),
        ({"n": 2, "temperature": 0}, "all outputs would be equal"),
        ({"n": 1.5}, "must be an integer"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\], got 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": "hot"}, "finite number, got 'hot'"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k must be at least 0, got -2"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**64}, "64 bits"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "must not be above max_tokens"),
        ({"logprobs": -2}, "-1 for the whole vocabulary"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"stop": [""]}, "non-empty"),
        ({"stop": ["a"], "detokenize": False}, "detokenize=True"),
        ({"stop_token_ids": [-1]}, "token ids"),
        ({"stop_token_ids": ["a"]}, "got 'a'"),
        ({"allowed_token_ids": []}, "must not be empty"),
        ({"logit_bias": {"a": 1.0}}, "keys must be token ids"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 must be a finite number"),
        ({"logit_bias": {1: "x"}}, "finite number, got 'x'"),
        ({"logit_bias": {-1: 1.0}}, "token ids"),
        ({"bad_words": [" "]}, "non-empty"),
        ({"bad_words": [f"x{i}" for i in range(129)]}, "limit 128"),
        ({"logprob_token_ids": [1] * 129}, "limit is 128"),
        ({"logprob_token_ids": [1, 2], "logprobs": 3}, "logprobs is 3 beside 2 logprob_token_ids"),
        ({"seed": -(2**63) - 1}, "64 bits"),
        ({"structured_outputs": {"regex": ""}}, "regex must be text"),
        ({"structured_outputs": "a"}, "must be StructuredOutputsParams or a mapping"),
    ],
    ids=str,
)
def test_a_value_out_of_bounds_is_an_error_that_names_it(values, match) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**values)


def test_greedy_sampling_resets_what_has_no_effect() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=7, min_p=0.2)
    assert params.is_greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)


def test_tiny_temperatures_are_raised() -> None:
    assert SamplingParams(temperature=1e-5).temperature == 0.01


def test_other_spellings_are_brought_into_one_form() -> None:
    params = SamplingParams(
        stop="END", top_k=-1, seed=-1, logprobs=True, logit_bias={"5": 200, 6: -1}, bad_words="x"
    )
    assert (params.stop, params.top_k, params.seed, params.logprobs) == (["END"], 0, None, 1)
    assert params.logit_bias == {5: 100.0, 6: -1.0}
    assert params.bad_words == ["x"]


def test_numbers_of_numpy_are_accepted() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([1, 2])
    )
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 3, [1, 2])
    assert type(params.top_k) is int


def test_a_clone_is_checked_again_and_leaves_the_original_alone() -> None:
    params = SamplingParams(n=2, stop=["a"])
    assert params.clone(n=1, seed=4).seed == 4
    assert params.seed is None
    with pytest.raises(ValueError, match="all outputs would be equal"):
        params.clone(temperature=0)


def test_a_clone_shares_nothing_with_the_original() -> None:
    params = SamplingParams(
        stop=["a"], logit_bias={1: 2.0}, bad_words=["x"], extra_args={"a": {"b": 1}}
    )
    for copied in (params.clone(), params.clone(max_tokens=3)):
        assert copied.clone(max_tokens=16) == params
        copied.stop.append("b")
        copied.logit_bias[1] = 3.0
        copied.bad_words.append("y")
        copied.extra_args["a"]["b"] = 2
    assert params == SamplingParams(
        stop=["a"], logit_bias={1: 2.0}, bad_words=["x"], extra_args={"a": {"b": 1}}
    )


def test_n_may_be_given_by_position_and_nothing_else() -> None:
    assert SamplingParams(3).n == 3
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(3, 0.5)


@pytest.mark.parametrize("seed", [0, -2, -(2**63), 2**63 - 1, 2**64 - 1, 2**64 - 2])
def test_every_output_has_a_seed_of_its_own_over_the_whole_range(seed) -> None:
    params = SamplingParams(n=3, seed=seed, prompt_logprobs=1)
    children = [params.for_output(index) for index in range(3)]
    assert [child.seed for child in children] == [(seed + index) % 2**64 for index in range(3)]
    assert [child.prompt_logprobs for child in children] == [1, None, None]
    assert {child.n for child in children} == {1}
    assert SamplingParams(n=3, seed=-1).for_output(2).seed is None


def test_an_infinite_bias_is_the_strongest_there_is() -> None:
    bias = SamplingParams(logit_bias={1: float("inf"), "2": -float("inf"), 3: 101}).logit_bias
    assert bias == {1: 100.0, 2: -100.0, 3: 100.0}


def test_properties_say_what_the_sampler_needs() -> None:
    assert not SamplingParams().has_penalties
    assert SamplingParams(repetition_penalty=1.1).has_penalties
    assert SamplingParams(stop_token_ids=[3, 3]).all_stop_token_ids == {3}
    assert SamplingParams().num_logprobs is None
    assert SamplingParams(logprobs=-1).num_logprobs == -1
    assert SamplingParams(logprob_token_ids=[1]).num_logprobs == 0


def test_the_repr_shows_what_was_set() -> None:
    assert repr(SamplingParams(temperature=0.5, stop="x")) == (
        "SamplingParams(temperature=0.5, stop=['x'])"
    )
