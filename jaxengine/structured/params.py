"""StructuredOutputsParams: the form that an output must have, with vLLM's names.

Standard library only: checked when made, compiled elsewhere (``compiler``).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_GRAMMAR_BYTES = 256 * 1024  # of a schema, regex, list of choices or grammar
MAX_NESTING = 64  # vLLM's limit, and half of what the grammar library takes
MAX_CHOICES = 10_000
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# What clients of older servers send.
OLD_NAMES = {
    **{f"guided_{name}": name for name in (*CONSTRAINTS[:4], "json_object")},
    "guided_whitespace_pattern": "whitespace_pattern",
}
JSON_OBJECT = {"type": "object"}


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """What an output must obey: exactly one constraint, and how JSON is written.

    Args:
        json: JSON schema, as a dict or its text; or a class with ``model_json_schema``.
        regex: Regular expression that the whole output matches. No look-around.
        choice: The output is one of these strings.
        grammar: Context-free grammar in Lark's or GBNF's notation.
        json_object: Any JSON object.
        structural_tag: Free text with constrained parts, in vLLM's notation, as a dict or JSON.
        disable_any_whitespace: JSON without whitespace between its tokens.
        disable_additional_properties: Objects of the schema have no properties but those named.
        whitespace_pattern: Regular expression of the whitespace between JSON's tokens.
        disable_fallback: Accepted for vLLM's sake; there is one compiler of grammars.

    Raises:
        ValueError: If not exactly one constraint is set, or it is empty, malformed, larger than
            256 KiB or nested deeper than 64 levels.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    disable_fallback: bool = False

    def __post_init__(self) -> None:
        """Bring the constraint into one form and check it."""
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise ValueError(f"json_object must be true or false, got {self.json_object!r}")
        self.json_object = self.json_object or None
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured outputs take exactly one of {', '.join(CONSTRAINTS)}; got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            self.json = _schema(self.json)
        if self.structural_tag is not None:
            self.structural_tag = _json_value("structural_tag", self.structural_tag)
            if not isinstance(self.structural_tag, dict):
                raise ValueError("structural_tag must be a JSON object")
        if self.choice is not None:
            self.choice = _choices(self.choice)
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))

    @property
    def kind(self) -> str:
        """The name of the constraint that is set."""
        return next(name for name in CONSTRAINTS if getattr(self, name) is not None)

    @property
    def key(self) -> str:
        """A text that is equal for equal grammars. The order of a schema's properties counts."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({name: value for name, value in values.items() if value})


@dataclass(kw_only=True)
class GuidedDecodingParams(StructuredOutputsParams):
    """The older name of ``StructuredOutputsParams``.

    Args:
        backend: Accepted and ignored: there is one compiler of grammars.
        backend_was_auto: The same.
    """

    backend: str | None = None
    backend_was_auto: bool = False


def structured_outputs_from(request: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Read the structured output that a request of the HTTP interface asks for, if any.

    Args:
        request: Its fields: ``structured_outputs``, OpenAI's ``response_format``, or the older
            ``guided_json``, ``guided_regex``, ``guided_choice``, ``guided_grammar``.

    Raises:
        ValueError: If it asks for several, or for what is not possible.
    """
    found = {new: request[old] for old, new in OLD_NAMES.items() if request.get(old) is not None}
    asked: list[StructuredOutputsParams | None] = []
    asked += [as_params(found)] if found.keys() - {"whitespace_pattern"} else []
    if (given := request.get("structured_outputs")) is not None:
        asked.append(as_params(given))
    if (response_format := request.get("response_format")) is not None:
        asked.append(_of_response_format(response_format))
    wanted = [params for params in asked if params is not None]
    if len(wanted) > 1:
        raise ValueError(
            "give only one of structured_outputs, response_format and the guided_ fields"
        )
    return wanted[0] if wanted else None


def as_params(value: Any) -> StructuredOutputsParams:
    """Return the params themselves, or those that a mapping spells out."""
    if isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"structured_outputs must be StructuredOutputsParams or a mapping, got {value!r}"
        )
    known = {field.name for field in fields(StructuredOutputsParams)}
    values: dict[str, Any] = {OLD_NAMES.get(str(k), str(k)): given for k, given in value.items()}
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"structured_outputs has no field {unknown[0]!r}; its fields are "
            f"{', '.join(sorted(known))}"
        )
    return StructuredOutputsParams(**values)


def _of_response_format(value: Any) -> StructuredOutputsParams | None:
    """OpenAI's ``response_format``, and vLLM's ``structural_tag`` in it."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=dict(value))
    if kind != "json_schema":
        raise ValueError(
            "response_format's type must be text, json_object, json_schema or structural_tag, "
            f"got {kind!r}"
        )
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if schema is None:
        raise ValueError('response_format of type json_schema needs {"json_schema": {"schema": ..}')
    return StructuredOutputsParams(json=schema)


def _schema(value: Any) -> dict[str, Any]:
    if hasattr(value, "model_json_schema"):  # a pydantic model
        value = value.model_json_schema()
    schema = _json_value("json", value)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError(f"json must be a JSON schema (an object), got {schema!r:.100}")
    return schema


def _json_value(name: str, value: Any) -> Any:
    """Return JSON text or a value as a value, within the limits."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        _check_size(name, text)
        parsed = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep(name)) from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if _depth(parsed) > MAX_NESTING:
        raise ValueError(_too_deep(name))
    return parsed


def _depth(value: Any) -> int:
    """How many objects and arrays lie within each other."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list) and item]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _choices(value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"choice must be a list of strings, not empty, got {value!r:.100}")
    if len(value) > MAX_CHOICES:
        raise ValueError(
            f"choice holds {len(value)} strings, the limit is {MAX_CHOICES}; use a regex"
        )
    for choice in value:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"choice must hold non-empty strings, got {choice!r}")
    _check_size("choice", "".join(value))
    return list(value)


def _check_text(name: str, text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must be text, not empty, got {text!r:.100}")
    if "\0" in text:
        raise ValueError(f"{name} holds a NUL character, which no text can match")
    _check_size(name, text)
    if _bracket_depth(text) > MAX_NESTING:
        raise ValueError(_too_deep(name))


def _check_size(name: str, text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise ValueError(
            f"{name} is {size} bytes long, the limit is {MAX_GRAMMAR_BYTES}; simplify it"
        )


def _bracket_depth(text: str) -> int:
    """How deep round brackets are nested; escaped ones do not count."""
    depth = deepest = 0
    is_escaped = False
    for character in text:
        if not is_escaped:
            depth = max(0, depth + (character == "(") - (character == ")"))
            deepest = max(deepest, depth)
        is_escaped = character == "\\" and not is_escaped
    return deepest


def _too_deep(name: str) -> str:
    return f"{name} is nested deeper than {MAX_NESTING} levels; flatten it or use $ref"
