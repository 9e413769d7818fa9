"""``tools`` and ``tool_choice`` of a request -> the form that the output must have.

``required`` and a named function are promises, kept by a JSON schema as structured output; ``auto``
leaves the model free, and its own notation to the tool parser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxengine.structured.params import StructuredOutputsParams

CHOICES = ("none", "auto", "required")
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """What a request says about tools.

    Attributes:
        mode: none, auto, required or named.
        name: The function's, if it is named.
        structured_outputs: What holds the output to it; None if it is free.
    """

    mode: str
    name: str | None = None
    structured_outputs: StructuredOutputsParams | None = None


def read_tool_choice(
    tools: Sequence[Tool] | None, tool_choice: Any = None, *, parallel_tool_calls: bool = True
) -> ToolChoice:
    """Read a request's tools.

    Args:
        tools: In OpenAI's form, ``{"type": "function", "function": {"name": ..., ...}}``.
        tool_choice: ``none``, ``auto``, ``required``, or
            ``{"type": "function", "function": {"name": ...}}``; None means auto if there are tools.
        parallel_tool_calls: Whether an output may hold several calls.

    Raises:
        ValueError: If a tool has no name, or the choice is none of these or names no tool.
    """
    functions = [_function(tool) for tool in tools or ()]
    if tool_choice is None:
        tool_choice = "auto" if functions else "none"
    if isinstance(tool_choice, Mapping):
        return _named(functions, tool_choice)
    if tool_choice not in CHOICES:
        raise ValueError(
            f"tool_choice must be one of {', '.join(CHOICES)} or name a function, "
            f"got {tool_choice!r}"
        )
    if tool_choice != "none" and not functions:
        raise ValueError(f"tool_choice {tool_choice!r} needs tools, and there are none")
    if tool_choice != "required":
        return ToolChoice(tool_choice)
    schema = required_schema(functions, parallel_tool_calls=parallel_tool_calls)
    return ToolChoice("required", structured_outputs=StructuredOutputsParams(json=schema))


def required_schema(
    functions: Sequence[Mapping[str, Any]], *, parallel_tool_calls: bool
) -> dict[str, Any]:
    """Schema of an array of at least one call of these functions.

    Each function's parameters lie under ``$defs``, so that references within them can be turned to
    where they are now.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": {"$ref": f"#/$defs/{number}"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, function in enumerate(functions)
    ]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": calls},
        "$defs": {
            str(number): _with_references_below(_parameters(function), f"#/$defs/{number}")
            for number, function in enumerate(functions)
        },
    }
    return schema if parallel_tool_calls else {**schema, "maxItems": 1}


def _named(functions: Sequence[Mapping[str, Any]], tool_choice: Mapping[str, Any]) -> ToolChoice:
    described = tool_choice.get("function", tool_choice)
    name = described.get("name") if isinstance(described, Mapping) else None
    for function in functions:
        if function["name"] == name:
            parameters = StructuredOutputsParams(json=_parameters(function))
            return ToolChoice("named", name, parameters)
    known = ", ".join(function["name"] for function in functions) or "none"
    raise ValueError(f"tool_choice names the function {name!r}, but the tools are: {known}")


def _function(tool: Tool) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'a tool must be {{"function": {{"name": ...}}}}, got {tool!r:.100}')
    return function


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function.get("parameters") or {"type": "object", "properties": {}})


def _with_references_below(value: Any, place: str) -> Any:
    """A schema whose references to its own root are turned to the place that it was put at."""
    if isinstance(value, list):
        return [_with_references_below(each, place) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: place + inner[1:]
        if key == "$ref" and isinstance(inner, str) and inner.startswith("#")
        else _with_references_below(inner, place)
        for key, inner in value.items()
    }
