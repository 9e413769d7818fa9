"""Sampling parameters that vLLM has or had, and ours has not."""

import pytest

from jaxengine import SamplingParams
from jaxengine.compat.sampling_fields import FORMER_FIELDS


@pytest.mark.parametrize("field", FORMER_FIELDS, ids=lambda field: field.name)
def test_a_former_field_is_taken_if_it_asks_for_nothing(field) -> None:
    for value in (None, *field.neutral):
        assert SamplingParams(**{field.name: value}) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"best_of": 3}, "best_of=3 is not supported: ask for n outputs"),
        ({"best_of": 3, "n": 2}, "best_of=3 is not supported"),
        ({"logits_processors": [print]}, "logits_processors=.* is not supported: edit logits"),
        ({"guided_json": {"a": 1}}, "use structured_outputs={'json': ...}"),
        ({"use_beam_search": True}, "call LLM.beam_search"),
        ({"extra_args": {"a": [{"b": 2**64}]}}, "extra_args holds 18446744073709551616"),
        ({"max_tokens": 2**70}, "max_tokens must fit in 64 bits"),
    ],
)
def test_a_former_field_that_asks_for_something_is_refused_with_a_remedy(fields, match) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**fields)


def test_best_of_n_is_n() -> None:
    assert SamplingParams(n=2, best_of=2) == SamplingParams(n=2)


def test_a_misspelt_parameter_names_the_one_that_may_have_been_meant() -> None:
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)


def test_none_is_the_default_in_from_optional_but_for_max_tokens() -> None:
    params = SamplingParams.from_optional(n=None, temperature=None, top_p=0.5, max_tokens=None)
    assert params == SamplingParams(top_p=0.5, max_tokens=None)
