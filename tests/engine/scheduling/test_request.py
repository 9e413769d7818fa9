"""Tests of jaxengine.engine.scheduling.request."""

import pytest

from jaxengine.engine.scheduling.request import FinishReason
from tests.engine.helpers import EOS, make_request


def test_prompt_and_output_are_numbered_together() -> None:
    request = make_request("a", [5, 6, 7])
    request.append_output_token(8)
    assert list(request.all_token_ids) == [5, 6, 7, 8]
    assert request.prompt_token_ids == [5, 6, 7]
    assert request.output_token_ids == [8]
    assert (request.num_prompt_tokens, request.num_output_tokens, request.num_tokens) == (3, 1, 4)


def test_placeholders_count_as_tokens_without_a_value() -> None:
    request = make_request("a", [5, 6, 7])
    request.num_output_placeholders = 2
    assert request.num_tokens == 3
    assert request.num_tokens_with_placeholders == 5


@pytest.mark.parametrize("token_id", [2**31, -(2**31) - 1, 1.5, "x"])
def test_a_token_that_is_no_32_bit_integer_is_refused(token_id: object) -> None:
    with pytest.raises(ValueError, match="request 'a': prompt_token_ids must be integers"):
        make_request("a", [1, token_id])


def test_the_models_end_token_stops_without_a_stop_reason() -> None:
    request = make_request("a")
    request.max_num_tokens = 100
    request.append_output_token(EOS)
    assert request.find_stop() == (FinishReason.STOP, None)


def test_ignore_eos_goes_on_behind_the_models_end_token() -> None:
    request = make_request("a", ignore_eos=True)
    request.max_num_tokens = 100
    request.append_output_token(EOS)
    assert request.find_stop() is None


def test_min_tokens_keeps_the_models_end_token_away_even_with_ignore_eos() -> None:
    for ignore_eos in (False, True):
        request = make_request("a", ignore_eos=ignore_eos, stop_token_ids=[7])
        assert request.end_token_ids == {EOS, 7}


def test_a_users_stop_token_is_the_stop_reason_even_with_ignore_eos() -> None:
    request = make_request("a", ignore_eos=True, stop_token_ids=[EOS])
    request.max_num_tokens = 100
    request.append_output_token(EOS)
    assert request.find_stop() == (FinishReason.STOP, EOS)


def test_stop_tokens_do_not_count_before_min_tokens() -> None:
    request = make_request("a", min_tokens=2)
    request.max_num_tokens = 100
    request.append_output_token(EOS)
    assert request.find_stop() is None
    request.append_output_token(EOS)
    assert request.find_stop() == (FinishReason.STOP, None)


def test_length_ends_a_request_and_a_stop_token_there_wins() -> None:
    request = make_request("a", 3)
    request.max_num_tokens = 4
    request.append_output_token(7)
    assert request.find_stop() == (FinishReason.LENGTH, None)
    stopped = make_request("b", 3)
    stopped.max_num_tokens = 4
    stopped.append_output_token(EOS)
    assert stopped.find_stop() == (FinishReason.STOP, None)
