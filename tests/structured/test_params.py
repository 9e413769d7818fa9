"""What a user may ask of an output's form, and what is refused before anything is compiled."""

import dataclasses
import json
from typing import Any

import pytest

from jaxengine import SamplingParams
from jaxengine.structured.params import (
    MAX_GRAMMAR_BYTES,
    MAX_NESTING,
    GuidedDecodingParams,
    StructuredOutputsParams,
    structured_outputs_from,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def nested_schema(depth: int) -> dict[str, Any]:
    """Arrays of arrays: ``depth`` objects within each other."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth - 1):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_may_be_a_dict_its_text_or_a_model_class() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return SCHEMA

    found = [
        StructuredOutputsParams(json=form).json for form in (SCHEMA, json.dumps(SCHEMA), Model)
    ]
    assert found == [SCHEMA, SCHEMA, SCHEMA]


def test_a_schema_may_be_nested_to_the_limit_and_no_deeper() -> None:
    StructuredOutputsParams(json=nested_schema(MAX_NESTING))
    with pytest.raises(ValueError, match="json is nested deeper than 64 levels"):
        StructuredOutputsParams(json=nested_schema(MAX_NESTING + 1))
    with pytest.raises(ValueError, match="json is nested deeper than 64 levels"):
        StructuredOutputsParams(json="[" * 100_000 + "]" * 100_000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of .*; got none"),
        ({"json_object": False}, "exactly one of .*; got none"),
        ({"regex": "a", "choice": ["a"]}, "got regex and choice"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": "[1]"}, "json must be a JSON schema"),
        ({"json": {"enum": ["x" * MAX_GRAMMAR_BYTES]}}, "the limit is 262144; simplify it"),
        ({"json_object": "yes"}, "json_object must be true or false"),
        ({"regex": ""}, "regex must be text, not empty"),
        ({"regex": 5}, "regex must be text"),
        ({"regex": "a\0b"}, "regex holds a NUL character"),
        ({"regex": "(" * 65 + "a" + ")" * 65}, "regex is nested deeper than 64 levels"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "regex is 262145 bytes long"),
        ({"grammar": "  "}, "grammar must be text, not empty"),
        ({"choice": []}, "choice must be a list of strings"),
        ({"choice": "yes"}, "choice must be a list of strings"),
        ({"choice": ["yes", ""]}, "choice must hold non-empty strings"),
        ({"choice": ["a"] * 10_001}, "choice holds 10001 strings, the limit is 10000"),
        ({"structural_tag": "[]"}, "structural_tag must be a JSON object"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**fields)


def test_escaped_brackets_of_a_regex_do_not_nest() -> None:
    assert StructuredOutputsParams(regex=r"\(" * 100).kind == "regex"


def test_the_key_tells_grammars_apart_by_the_order_of_properties_too() -> None:
    one = {"type": "object", "properties": {"a": {}, "b": {}}}
    other = {"type": "object", "properties": {"b": {}, "a": {}}}
    keys = {StructuredOutputsParams(json=schema).key for schema in (one, other)}
    keys.add(StructuredOutputsParams(json=one, disable_any_whitespace=True).key)
    assert len(keys) == 3
    assert StructuredOutputsParams(json=json.dumps(one)).key in keys


@pytest.mark.parametrize(
    ("request_fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": "start: \"a\""}, {"grammar": "start: \"a\""}),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
         {"json": SCHEMA, "whitespace_pattern": " ?"}),
        ({"structured_outputs": {"regex": "a"}}, {"regex": "a"}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
         {"json": SCHEMA}),
        ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
         {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}}),
    ],
)  # fmt: skip
def test_every_spelling_of_an_http_request_is_read(request_fields: Any, expected: Any) -> None:
    found = structured_outputs_from(request_fields)
    defaults = {f.name: f.default for f in dataclasses.fields(StructuredOutputsParams)}
    assert (found and dataclasses.asdict(found)) == (expected and {**defaults, **expected})


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "got regex and choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "give only one of"),
        ({"response_format": {"type": "xml"}}, "response_format's type must be"),
        ({"response_format": {"type": "json_schema"}}, "json_schema needs"),
        ({"structured_outputs": {"regexp": "a"}}, "no field 'regexp'"),
    ],
)
def test_what_an_http_request_may_not_ask_is_refused(request_fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structured_outputs_from(request_fields)


def test_sampling_params_take_a_mapping_and_the_older_name() -> None:
    expected = StructuredOutputsParams(choice=["a"])
    assert SamplingParams(structured_outputs={"choice": ["a"]}).structured_outputs == expected
    older = SamplingParams(guided_decoding=GuidedDecodingParams(choice=["a"], backend="outlines"))
    assert older.structured_outputs is not None
    assert older.structured_outputs.choice == ["a"]
    assert older.clone(n=2).structured_outputs == older.structured_outputs
    with pytest.raises(ValueError, match="give one of the two"):
        SamplingParams(structured_outputs=expected, guided_decoding=expected)


@pytest.mark.parametrize(("given", "expected"), [(None, None), (-1, None), (0, 0), (7, 7)])
def test_a_thinking_budget_of_minus_one_is_none(given: int | None, expected: int | None) -> None:
    assert SamplingParams(thinking_token_budget=given).thinking_token_budget == expected


def test_a_negative_thinking_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="thinking_token_budget must be at least 0, got -2"):
        SamplingParams(thinking_token_budget=-2)
