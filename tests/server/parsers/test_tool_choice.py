"""What ``tool_choice`` promises, as a schema that outputs are held to."""

import json
from typing import Any

import jsonschema
import pytest

from jaxengine.server.parsers.forced_calls import NamedCallParser, RequiredCallsParser
from jaxengine.server.parsers.tool_choice import ToolChoice, read_tool_choice
from jaxengine.structured.params import StructuredOutputsParams
from tests.structured.helpers import compiler, decode, random_output

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
WEATHER = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/digit"}, "next": {"$ref": "#"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"digit": DIGIT},
}
PLACE = {
    "type": "object",
    "properties": {"on": {"$ref": "#/$defs/digit"}},
    "required": ["on"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "boolean"}},
}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", WEATHER), tool("place", PLACE)]


@pytest.mark.parametrize(
    ("tools", "choice", "expected"),
    [
        (None, None, ToolChoice("none")),
        (TOOLS, None, ToolChoice("auto")),
        (TOOLS, "auto", ToolChoice("auto")),
        (TOOLS, "none", ToolChoice("none")),
        ([], "none", ToolChoice("none")),
    ],
)
def test_auto_and_none_leave_the_output_free(tools: Any, choice: Any, expected: ToolChoice) -> None:
    assert read_tool_choice(tools, choice) == expected


def grammar_walk(params: StructuredOutputsParams | None, seed: int) -> str:
    assert params is not None
    state = compiler().compile(params).new_state()
    return decode(random_output(state, seed, max_tokens=2000))


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_required_choice_gives_calls_whose_arguments_fit_their_own_schemas(
    seed: int, is_parallel: bool
) -> None:
    """References mean the tool's own definitions, though two tools have one of the same name."""
    choice = read_tool_choice(TOOLS, "required", parallel_tool_calls=is_parallel)
    assert choice.structured_outputs is not None
    choice.structured_outputs.disable_any_whitespace = True
    calls = RequiredCallsParser().parse(grammar_walk(choice.structured_outputs, seed)).tool_calls
    assert len(calls) >= 1
    assert is_parallel or len(calls) == 1
    for call in calls:
        schema = {"weather": WEATHER, "place": PLACE}[call.name]
        jsonschema.validate(json.loads(call.arguments), schema)


def test_a_named_function_gives_its_arguments() -> None:
    choice = read_tool_choice(TOOLS, {"type": "function", "function": {"name": "place"}})
    assert (choice.mode, choice.name) == ("named", "place")
    assert choice.structured_outputs is not None
    choice.structured_outputs.disable_any_whitespace = True
    (call,) = NamedCallParser("place").parse(grammar_walk(choice.structured_outputs, 1)).tool_calls
    assert call.name == "place"
    assert call.arguments in ('{"on":true}', '{"on":false}')


def test_a_tool_without_parameters_takes_an_object() -> None:
    choice = read_tool_choice([tool("now")], {"function": {"name": "now"}})
    assert choice.structured_outputs == StructuredOutputsParams(
        json={"type": "object", "properties": {}}
    )


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, "always", "tool_choice must be one of none, auto, required or name a function"),
        (None, "required", "tool_choice 'required' needs tools, and there are none"),
        (None, "auto", "tool_choice 'auto' needs tools"),
        (TOOLS, {"function": {"name": "x"}}, "names the function 'x', but the tools are: weather"),
        (TOOLS, {"function": 5}, "names the function None"),
        ([{"name": "f"}], None, 'a tool must be {"function": {"name"'),
        (["f"], None, "a tool must be"),
    ],
)
def test_what_is_not_possible_is_refused(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tool_choice(tools, choice)
