"""A limit on reasoning, and a grammar that applies behind it."""

import random

import pytest

from jaxengine.structured.reasoning import ReasoningConstraint, markers_of
from tests.structured.helpers import EOS, VOCAB_SIZE, allowed_ids, encode, new_state

THINK, END_A, END_B, X = 11, 12, 13, 20  # the end marker is two tokens
EVERYTHING = list(range(-(-VOCAB_SIZE // 32) * 32))


def constraint(
    prompt: list[int], *, budget: int | None = None, regex: str | None = None
) -> ReasoningConstraint:
    grammar = None if regex is None else new_state(regex=regex)
    return ReasoningConstraint([THINK], [END_A, END_B], prompt, budget=budget, grammar=grammar)


def accept(state: ReasoningConstraint, *token_ids: int) -> ReasoningConstraint:
    for token_id in token_ids:
        state.accept(token_id)
    return state


def test_reasoning_is_free_until_its_budget_is_used_up_and_then_ends_token_by_token() -> None:
    state = constraint([THINK], budget=3)
    found = []
    for token_id in (X, X, X, END_A, END_B, X):
        found.append(allowed_ids(state))
        state.accept(token_id)
    assert found == [EVERYTHING] * 3 + [[END_A], [END_B], EVERYTHING]


def test_reasoning_that_ends_by_itself_is_not_forced() -> None:
    state = accept(constraint([THINK], budget=4), X, END_A, END_B)
    for _ in range(6):
        assert allowed_ids(state) == EVERYTHING
        state.accept(X)


def test_a_budget_of_zero_ends_reasoning_at_once() -> None:
    assert allowed_ids(constraint([THINK], budget=0)) == [END_A]
    assert allowed_ids(accept(constraint([], budget=0), THINK)) == [END_A]
    assert allowed_ids(constraint([], budget=0)) == EVERYTHING  # it has not begun


def test_half_an_end_marker_is_reasoning_still() -> None:
    state = accept(constraint([THINK], budget=9), END_A, X, END_A, END_A, END_B)
    assert state.deciding_grammar is None
    assert state._phase == "content"


def test_a_grammar_waits_for_the_end_of_reasoning() -> None:
    state = constraint([THINK], regex="ab")
    assert allowed_ids(state) == EVERYTHING
    accept(state, X, EOS, END_A, END_B)
    assert allowed_ids(state) == encode("a")
    accept(state, *encode("a"), *encode("b"))
    assert state.is_terminated
    assert allowed_ids(state) == [EOS]


def test_without_reasoning_in_the_prompt_the_output_may_begin_with_it_or_with_the_grammar() -> None:
    assert allowed_ids(constraint([X], regex="ab")) == sorted([THINK, *encode("a")])
    assert allowed_ids(accept(constraint([X], regex="ab"), *encode("a"))) == encode("b")
    assert allowed_ids(accept(constraint([X], regex="ab"), THINK)) == EVERYTHING


@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        ([], "start"),
        ([THINK], "reasoning"),
        ([X, THINK, X, X], "reasoning"),
        ([THINK, X, END_A, END_B], "content"),
        ([THINK, END_A, END_B, X, X], "content"),  # and some line ends
        ([THINK, X, END_A, END_B, X, X, X, X, X], "start"),  # of an earlier answer
        ([THINK, X, END_A, END_B, X, X, X, X, X, THINK], "reasoning"),
    ],
)
def test_the_prompt_says_where_an_output_begins(prompt: list[int], phase: str) -> None:
    assert constraint(prompt)._phase == phase


def test_where_there_is_no_start_marker_an_output_begins_with_reasoning() -> None:
    forced = [7, 8, END_A]
    state = ReasoningConstraint([], [END_A], [END_A, X], forced_ids=forced, budget=1)
    found = []
    for token_id in (X, *forced, X):
        found.append(allowed_ids(state))
        state.accept(token_id)
    assert found == [EVERYTHING, [7], [8], [END_A], EVERYTHING]


@pytest.mark.parametrize("seed", range(20))
def test_rolling_back_is_as_if_the_tokens_had_never_come(seed: int) -> None:
    rng = random.Random(seed)
    prompt = rng.choice([[], [THINK], [THINK, END_A, END_B]])
    budget = rng.choice([None, 0, 2, 5])
    state, tokens = constraint(prompt, budget=budget, regex="[ab]+"), []
    for _ in range(30):
        if tokens and rng.random() < 0.3:
            count = rng.randint(0, min(4, len(tokens)))
            del tokens[len(tokens) - count :]
            state.rollback(count)
        else:
            choices = allowed_ids(state)
            likely = [t for t in choices if t in (THINK, END_A, END_B, X, *encode("ab"))]
            tokens.append(rng.choice(likely or choices))
            state.accept(tokens[-1])
        fresh = accept(constraint(prompt, budget=budget, regex="[ab]+"), *tokens)
        assert state.num_tokens == fresh.num_tokens == len(tokens)
        assert allowed_ids(state) == allowed_ids(fresh)
        assert state.error is None


def test_an_error_of_the_grammar_is_an_error() -> None:
    state = constraint([THINK, END_A, END_B], regex="a")
    assert state.error is None
    assert accept(state, X).error is not None


def test_parsers_have_markers_by_name() -> None:
    assert markers_of("") is None
    assert [markers_of(name).end for name in ("qwen3", "gpt_oss")] == [  # type: ignore[union-attr]
        *("</think>", "<|channel|>final<|message|>")
    ]
