"""Every kind of grammar, without a model: masks, walks through them, and what is refused."""

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from jaxengine.structured.constraint import num_mask_words
from jaxengine.structured.masks import fill_masks
from jaxengine.structured.reasoning import ReasoningConstraint
from jaxengine.structured.token_vocabulary import build_token_vocabulary
from tests.structured.helpers import (
    EOS,
    VOCAB_SIZE,
    allowed_ids,
    compiler,
    decode,
    encode,
    new_state,
    random_output,
    tokenizer,
)

KINDS: list[dict[str, Any]] = [
    {"regex": r"[a-c]{2,5}(-\d+)?"},
    {"choice": ["true", "trust", "no way"]},
    {"json_object": True, "whitespace_pattern": " ?"},
    {"json": {"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 3}},
    {"grammar": 'start: "<" inner ">"\ninner: start | /[0-9]/'},
    {"grammar": 'root ::= "(" expr ")"\nexpr ::= [a-z]+ | root'},
    {"structural_tag": {
        "triggers": ["<tool"],
        "structures": [{"begin": "<tool_call>", "schema": {"enum": [1, 2]}, "end": "</tool_call>"}],
    }},
]  # fmt: skip


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_mask_allows_exactly_the_tokens_that_are_accepted_one_by_one(
    fields: dict[str, Any],
) -> None:
    rng = random.Random(0)
    state = new_state(**fields)
    for _ in range(12):
        allowed = allowed_ids(state)
        accepted = [t for t in range(VOCAB_SIZE) if state.matcher.validate_tokens([t]) == 1]
        assert allowed == accepted
        assert max(allowed) < len(tokenizer())
        state.accept(rng.choice(allowed))
        if state.is_terminated:
            break


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"^[a-c]{2,5}(-\d+)?$"}, r"[a-c]{2,5}(-\d+)?"),
        ({"regex": r"price \$"}, r"price \$"),
        ({"choice": ["yes", 'say "no"', "no"]}, r'yes|say "no"|no'),
        ({"grammar": 'start: "(" start ")" | /[0-9]+/'}, r"\(*[0-9]+\)*"),
        ({"grammar": 'root ::= "x" | "(" root "," root ")"'}, r"[x(),]+"),
        ({"json_object": True, "disable_any_whitespace": True}, r"\{.*\}"),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_a_random_walk_obeys_the_grammar(fields: dict[str, Any], pattern: str, seed: int) -> None:
    text = decode(random_output(new_state(**fields), seed))
    assert re.fullmatch(pattern, text), text


def test_json_without_whitespace_has_none() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    state = new_state(json=schema, disable_any_whitespace=True)
    assert decode(random_output(state, 0)) == '{"a":1,"b":2}'


def test_properties_that_are_not_named_can_be_closed_out() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {}}}}
    closed = {"disable_additional_properties": True, "disable_any_whitespace": True}
    texts = {decode(random_output(new_state(json=schema, **closed), seed)) for seed in range(8)}
    assert texts == {"{}", '{"a":{}}'}


def test_after_the_end_only_end_tokens_may_follow() -> None:
    state = new_state(regex="ab?")
    state.accept(encode("a")[0])
    assert not state.is_terminated
    assert allowed_ids(state) == sorted([EOS, encode("b")[0]])
    state.accept(EOS)
    assert state.is_terminated
    for _ in range(3):
        assert allowed_ids(state) == [EOS]
        state.accept(EOS)
    assert state.num_tokens == 5
    assert state.error is None


def test_a_token_that_is_not_allowed_is_an_error_and_ends_the_output() -> None:
    state = new_state(regex="ab")
    state.accept(encode("b")[0])
    assert state.error is not None
    assert "doesn't satisfy the grammar" in state.error
    assert allowed_ids(state) == [EOS]


def test_a_text_that_the_vocabulary_cannot_write_is_an_error() -> None:
    state = new_state(choice=["né"])  # the tiny vocabulary has no bytes beyond ASCII
    state.accept(encode("n")[0])
    assert allowed_ids(state) == [EOS]
    assert state.error is not None


@pytest.mark.parametrize("num_back", range(7))
def test_rolling_back_is_as_if_the_tokens_had_never_come(num_back: int) -> None:
    tokens = [*encode("abba"), EOS, EOS]
    state, fresh = new_state(regex="[ab]+"), new_state(regex="[ab]+")
    for token_id in tokens:
        state.accept(token_id)
    state.rollback(num_back)
    for token_id in tokens[: len(tokens) - num_back]:
        fresh.accept(token_id)
    assert state.num_tokens == fresh.num_tokens == 6 - num_back
    assert allowed_ids(state) == allowed_ids(fresh)


def test_masks_filled_together_equal_those_filled_alone() -> None:
    states = [new_state(**fields) for fields in KINDS]
    states.append(ReasoningConstraint([5], [6], [5], budget=0))
    states.append(ReasoningConstraint([5], [6], [6], grammar=new_state(regex="a")))
    masks = np.full((len(states) + 1, num_mask_words(VOCAB_SIZE)), -7, np.int32)
    fill_masks(states, masks)
    for state, mask in zip(states, masks, strict=False):
        alone = np.zeros_like(mask)
        state.fill(alone)
        np.testing.assert_array_equal(mask, alone)
    assert (masks[-1] == -7).all()


def test_outputs_of_one_grammar_do_not_share_their_state() -> None:
    one, other = new_state(regex="ab"), new_state(regex="ab")
    one.accept(encode("a")[0])
    assert allowed_ids(one) == encode("b")
    assert allowed_ids(other) == encode("a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "(?=a)b"}, "the regex of structured_outputs cannot(.|\n)*look-around"),
        ({"regex": "a("}, "the regex of structured_outputs cannot be compiled"),
        ({"json": {"type": "string", "format": "nonsense"}}, "Unknown format: nonsense"),
        ({"json": {"$ref": "http://example.com/x"}}, "the json of structured_outputs cannot"),
        ({"json": {"type": "nothing"}}, "the json of structured_outputs cannot be compiled"),
        ({"grammar": "start: missing"}, 'unknown name: "missing"'),
        ({"grammar": 'root ::= "a'}, "grammar is neither Lark nor GBNF|cannot be compiled"),
        ({"structural_tag": {"format": {"type": "magic"}}}, "a format of type 'magic'; known are"),
        ({"structural_tag": {}}, "needs either 'format' or 'structures'"),
        ({"structural_tag": {"structures": [{"begin": "<a>"}], "triggers": ["<b"]}},
         r"no trigger of \['<b'\] begins the tag '<a>'"),
        ({"structural_tag": {"format": {"type": "tag", "begin": "a"}}}, "'content' is missing"),
        ({"structural_tag": {"format": {"type": "or", "elements": []}}}, "'elements' must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        new_state(**fields)


def test_a_grammar_is_compiled_once_and_a_bad_one_is_not_kept() -> None:
    one, other = [new_state_compiled({"regex": "once"}) for _ in range(2)]
    assert one is other
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be compiled"):
            new_state_compiled({"regex": "(?=a)"})


def new_state_compiled(fields: dict[str, Any]) -> Any:
    from jaxengine.structured.params import StructuredOutputsParams

    return compiler().compile(StructuredOutputsParams(**fields))


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(ValueError, match="set eos_token_id in its generation_config"):
        build_token_vocabulary(tokenizer(), VOCAB_SIZE, [])


CALL = {"begin": "<tool_call>", "content": {"type": "json_schema", "json_schema": {"const": 12}},
        "end": "</tool_call>"}  # fmt: skip
SPECIAL_CALL = {**CALL, "begin": "<|tool|>", "end": "<|end|>"}


@pytest.mark.parametrize(
    ("tag", "fitting", "failing"),
    [
        ({"format": {"type": "const_string", "value": "a<|end|>b"}}, ["a<|end|>b"], ["ab", "a"]),
        ({"format": {"type": "regex", "pattern": "[0-9]/x"}}, ["5/x"], ["5x"]),
        ({"format": {"type": "grammar", "grammar": 'start: "q"+'}}, ["q", "qqq"], ["", "a"]),
        ({"format": {"type": "any_text"}}, ["", "any\nthing"], ["<|tool|>"]),
        ({"format": CALL | {"type": "tag"}}, ["<tool_call>12</tool_call>"], ["<tool_call>13"]),
        ({"format": {"type": "tag", "begin": "<", "content": {"type": "any_text"}, "end": "/>"}},
         ["</>", "<a/b/>"], ["<a>", "<a/>b"]),
        ({"format": {"type": "tag", "begin": "<|tool|>", "content": {"type": "any_text"},
                     "end": ["<|end|>", "</s"]}},
         ["<|tool|>abc<|end|>", "<|tool|>a</s"], ["<|tool|>abc"]),
        ({"format": {"type": "sequence", "elements": [
            {"type": "const_string", "value": "a"}, {"type": "regex", "pattern": "b|c"}]}},
         ["ab", "ac"], ["a", "cb"]),
        ({"format": {"type": "or", "elements": [
            {"type": "const_string", "value": "ab"}, {"type": "const_string", "value": "ac"}]}},
         ["ab", "ac"], ["a", "abac"]),
        ({"format": {"type": "triggered_tags", "triggers": ["<tool"], "tags": [CALL]}},
         ["", "hello", "a<tool_call>12</tool_call>b<tool_call>12</tool_call>"],
         ["<tool_call>13", "<toolx"]),
        ({"format": {"type": "triggered_tags", "triggers": ["<|tool|>"], "tags": [SPECIAL_CALL]}},
         ["", "hi <|tool|>12<|end|> there"], ["<|tool|>13", "<|tool|>12</tool_call>"]),
        ({"format": {"type": "triggered_tags", "triggers": ["<tool"], "tags": [CALL],
                     "at_least_one": True}},
         ["so<tool_call>12</tool_call>"], ["hello"]),
        ({"format": {"type": "triggered_tags", "triggers": ["<tool"], "tags": [CALL],
                     "at_least_one": True, "stop_after_first": True}},
         ["<tool_call>12</tool_call>"], ["<tool_call>12</tool_call> more"]),
        ({"format": {"type": "tags_with_separator", "tags": [CALL], "separator": "\n"}},
         ["", "<tool_call>12</tool_call>\n<tool_call>12</tool_call>"],
         ["<tool_call>12</tool_call>\n"]),
        ({"triggers": ["<tool"], "structures": [
            {"begin": "<tool_call>", "schema": {"const": 12}, "end": "</tool_call>"},
            {"begin": "<tool=", "schema": {"const": True}, "end": ">"}]},
         ["x<tool_call>12</tool_call>y<tool=true>"], ["<tool=12>", "<tool_call>true"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_a_structural_tag_accepts_what_it_describes(
    tag: dict[str, Any], fitting: list[str], failing: list[str]
) -> None:
    assert [text for text in fitting if not is_accepted(tag, text)] == []
    assert [text for text in failing if is_accepted(tag, text)] == []


def is_accepted(tag: dict[str, Any], text: str) -> bool:
    state = new_state(structural_tag=tag)
    for token_id in encode(text):
        if token_id not in allowed_ids(state):
            return False
        state.accept(token_id)
    return EOS in allowed_ids(state)
