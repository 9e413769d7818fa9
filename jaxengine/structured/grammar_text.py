"""StructuredOutputsParams -> the text of a grammar, in the form that llguidance compiles."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher

from jaxengine.structured.params import JSON_OBJECT, StructuredOutputsParams
from jaxengine.structured.structural_tag import as_lark, structural_tag_grammar

# Keywords of JSON schema whose value is a schema, a list of schemas, or schemas by name.
SCHEMA = ("items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def grammar_text(params: StructuredOutputsParams, special_ids: Mapping[str, int]) -> str:
    """Return the grammar that the params ask for; whether it can be compiled is not known yet.

    Args:
        params: Checked.
        special_ids: Text of a special token -> its id.

    Raises:
        ValueError: If it cannot be written as a grammar.
    """
    write: dict[str, Callable[[], str]] = {
        "json": lambda: _json(params, params.json),
        "json_object": lambda: _json(params, JSON_OBJECT),
        "regex": lambda: LLMatcher.grammar_from_regex(_unanchored(params.regex or "")),
        "choice": lambda: _choice(params.choice or ()),
        "grammar": lambda: LLMatcher.grammar_from_lark(as_lark(params.grammar or "")),
        "structural_tag": lambda: structural_tag_grammar(params.structural_tag, special_ids),
    }
    return write[params.kind]()


def _json(params: StructuredOutputsParams, schema: dict[str, Any]) -> str:
    if params.disable_additional_properties:
        schema = closed(schema)
    options: Any = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(schema, defaults=options)


def _choice(choices: Any) -> str:
    alternatives = " | ".join(json.dumps(choice) for choice in choices)
    return LLMatcher.grammar_from_lark(f"start: {alternatives}")


def _unanchored(regex: str) -> str:
    """The whole output must match, so anchors around the regex say nothing new."""
    is_end = regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2 == 1
    return regex.removeprefix("^")[: -1 if is_end else None]


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those it names."""
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for name in SCHEMA:
        if name in result:
            result[name] = closed(result[name])
    for name in SCHEMA_LISTS:
        if isinstance(result.get(name), list):
            result[name] = [closed(each) for each in result[name]]
    for name in SCHEMA_MAPS:
        if isinstance(result.get(name), dict):
            result[name] = {key: closed(each) for key, each in result[name].items()}
    is_object = result.get("type") == "object" or "properties" in result
    if is_object and not {"additionalProperties", "patternProperties"} & result.keys():
        result["additionalProperties"] = False
    elif isinstance(result.get("additionalProperties"), dict):
        result["additionalProperties"] = closed(result["additionalProperties"])
    return result
