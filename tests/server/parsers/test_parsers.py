"""What each parser makes of an output, and that it does not matter how the output is cut."""

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.server.parsers import deepseek_v3 as ds
from jaxengine.server.parsers.deltas import ParsedOutput, ToolCall, collect
from jaxengine.server.parsers.forced_calls import NamedCallParser, RequiredCallsParser
from jaxengine.server.parsers.harmony import HarmonyParser
from jaxengine.server.parsers.hermes import HermesParser
from jaxengine.server.parsers.llama3_json import Llama3JsonParser
from jaxengine.server.parsers.mistral import MistralParser, new_mistral_id
from jaxengine.server.parsers.output_parser import OutputParser, check_parsers
from jaxengine.server.parsers.pythonic import PythonicParser
from jaxengine.server.parsers.qwen3_coder import Qwen3CoderParser
from jaxengine.server.parsers.reasoning import (
    DeepSeekR1Parser,
    LeadingThinkParser,
    ThinkParser,
    prompt_closes,
    prompt_leaves_open,
)
from jaxengine.server.parsers.stream_parser import StreamParser
from jaxengine.server.parsers.tool_choice import ToolChoice

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "n": {"type": "integer"},
                    "on": {"type": "boolean"},
                    "list": {"type": "array"},
                    "maybe": {"type": ["integer", "null"]},
                    "text": {"type": ["string", "null"]},
                    "any": {"anyOf": [{"type": "integer"}, {"type": "object"}]},
                },
            },
        },
    }
]
F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"arguments": {"b": [1, "}"]}, "name": "g"}'


def counted() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"id{next(numbers)}"


PARSERS: dict[str, Callable[[], StreamParser | OutputParser]] = {
    "hermes": lambda: HermesParser(counted()),
    "llama3_json": lambda: Llama3JsonParser(counted()),
    "mistral": lambda: MistralParser(counted()),
    "pythonic": lambda: PythonicParser(counted()),
    "qwen3_coder": lambda: Qwen3CoderParser(TOOLS, counted()),
    "deepseek_v3": lambda: ds.DeepSeekV3Parser(counted()),
    "harmony": lambda: HarmonyParser(counted()),
    "named": lambda: NamedCallParser("f", counted()),
    "required": lambda: RequiredCallsParser(counted()),
    "think": ThinkParser,
    "qwen3": LeadingThinkParser,
    "deepseek_r1": DeepSeekR1Parser,
    "open think": lambda: ThinkParser(is_open=True),
}


def calls(*pairs: tuple[str, str], content: str | None = None, reasoning: str | None = None) -> Any:
    """An output with these calls (name, arguments), named id0, id1, ..."""
    named = [ToolCall(f"id{i}", name, arguments) for i, (name, arguments) in enumerate(pairs)]
    return ParsedOutput(content, reasoning, named)


def text(content: str | None = None, reasoning: str | None = None) -> ParsedOutput:
    return ParsedOutput(content, reasoning)


def v3(name: str, arguments: str) -> str:
    return f"{ds.CALL_BEGIN}function{ds.SEPARATOR}{name}\n```json\n{arguments}\n```{ds.CALL_END}"


CASES: list[tuple[str, str, ParsedOutput]] = [
    ("hermes", "just text", text("just text")),
    ("hermes", "a < b <tool", text("a < b <tool")),
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", calls(("f", '{"a": 1}'))),
    ("hermes", f"Sure.\n\n<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>\n",
     calls(("f", '{"a": 1}'), ("g", '{"b": [1, "}"]}'), content="Sure.")),
    ("hermes", f"<tool_call>{F}</tool_call> Done. ", calls(("f", '{"a": 1}'), content="Done.")),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', calls(("f", "{}"))),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', calls(("f", '{"a": 1}'))),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
     calls(("f", '{"a": "</tool_call>"}'))),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', calls(("f", '{"a": [1'))),
    ("hermes", 'x <tool_call>{"nam', text('x <tool_call>{"nam')),
    ("hermes", "x <tool_call>no json</tool_call>", text("x <tool_call>no json</tool_call>")),
    ("hermes", '<tool_call>{"name": "ö\\n\\"", "arguments": {}}</tool_call>',
     calls(('ö\n"', "{}"))),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', calls(("f", '{"a": 1}'))),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}',
     calls(("f", "{}"))),
    ("llama3_json", f"{F}; {G}", calls(("f", '{"a": 1}'), ("g", '{"b": [1, "}"]}'))),
    ("llama3_json", '{"answer": 42}', text('{"answer": 42}')),
    ("llama3_json", ' {"a": {"name": "f"}} x', text(' {"a": {"name": "f"}} x')),
    ("llama3_json", 'Say {"name": "f"}', text('Say {"name": "f"}')),
    ("llama3_json", f"{F} and so on", calls(("f", '{"a": 1}'), content=" and so on")),
    ("mistral", f"[TOOL_CALLS][{F}, {G}]", calls(("f", '{"a": 1}'), ("g", '{"b": [1, "}"]}'))),
    ("mistral", f"Hm. [TOOL_CALLS] {F}", calls(("f", '{"a": 1}'), content="Hm.")),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[CALL_ID]123[ARGS]{}',
     calls(("f", '{"a": 1}'), ("g", "{}"))),
    ("mistral", "[TOOL_CALLS]f[ARGS]{}", calls(("f", "{}"))),
    ("mistral", "[TOOL_CALLS]oh", text("[TOOL_CALLS]oh")),
    ("mistral", "[TOOL_CALLS][]", text("[TOOL_CALLS][]")),
    ("mistral", "[1, 2]", text("[1, 2]")),
    ("pythonic", '[f(a=1, b="x)"), g.h(c=[1, {"d": None}], e=-2.5, t=(True, false))]',
     calls(("f", '{"a": 1, "b": "x)"}'),
           ("g.h", '{"c": [1, {"d": null}], "e": -2.5, "t": [true, false]}'))),
    ("pythonic", "<|python_start|>[f()]<|python_end|>", calls(("f", "{}"))),
    ("pythonic", "[1, 2, 3]", text("[1, 2, 3]")),
    ("pythonic", "[f(a=1), oops", calls(("f", '{"a": 1}'), content=" oops")),
    ("pythonic", "[f(1)]", text("[f(1)]")),
    ("pythonic", "[f(a=open('x'))]", text("[f(a=open('x'))]")),
    ("pythonic", "[f(a='it\\'s')]\n", calls(("f", '{"a": "it\'s"}'))),
    ("pythonic", "No [f()] here", text("No [f()] here")),
    ("qwen3_coder",
     "So:\n<tool_call>\n<function=f>\n<parameter=city>\nSan\nJosé\n</parameter>\n<parameter=n>\n3\n"
     "</parameter>\n<parameter=on>True</parameter>\n</function>\n</tool_call>",
     calls(("f", '{"city": "San\\nJosé", "n": 3, "on": true}'), content="So:")),
    ("qwen3_coder", "<function=f><parameter=list>[1, 'a']<parameter=city>5</function>",
     calls(("f", '{"list": [1, "a"], "city": "5"}'))),
    ("qwen3_coder", "<tool_call><function=f></function></tool_call><tool_call><function=g>"
     "<parameter=x>1</parameter></function></tool_call>",
     calls(("f", "{}"), ("g", '{"x": "1"}'))),
    ("qwen3_coder", "<function=f><parameter=maybe>null</parameter><parameter=text>null</parameter>"
     '<parameter=any>{"k": 1}</parameter><parameter=n>many</parameter></function>',
     calls(("f", '{"maybe": null, "text": "null", "any": {"k": 1}, "n": "many"}'))),
    ("qwen3_coder", "<tool_call> hm", text("<tool_call> hm")),
    ("deepseek_v3", f"Wait.\n{ds.CALLS_BEGIN}{v3('f', '{{}}')}\n{v3('g', F)}{ds.CALLS_END}",
     calls(("f", "{{}}"), ("g", F), content="Wait.")),
    ("deepseek_v3",
     f"{ds.CALLS_BEGIN}{ds.CALL_BEGIN}f{ds.SEPARATOR}{{\"a\": 1}}{ds.CALL_END}{ds.CALLS_END}",
     calls(("f", '{"a": 1}'))),
    ("deepseek_v3", f"{ds.CALL_BEGIN}function{ds.SEPARATOR}f\n{ds.CALL_END}", calls(("f", "{}"))),
    ("deepseek_v3", f"a{ds.CALL_BEGIN}func", text(f"a{ds.CALL_BEGIN}func")),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
     "<|message|>Hello<|return|>", text("Hello", "Hm.")),
    ("harmony", "<|channel|>final<|message|>Hello", text("Hello")),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
     "to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>",
     calls(("f", '{"a": 1}'), reasoning="Hm.")),
    ("harmony", "<|start|>assistant to=functions.f<|channel|>commentary json<|message|><|call|>",
     calls(("f", "{}"))),
    ("harmony", "<|channel|>commentary<|message|>First I look.<|end|>", text("First I look.")),
    ("harmony", "plain", text("plain")),
    ("harmony", "<|channel|>ana", text()),
    ("named", '{"a": 1}', calls(("f", '{"a": 1}'))),
    ("named", "", text()),
    ("required", '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]',
     calls(("f", '{"a": 1}'), ("g", "{}"))),
    ("required", "[]", text("[]")),
    ("required", "no", text("no")),
    ("think", "<think>a</think>b<think>c</think>d", text("bd", "ac")),
    ("think", "a<think>b", text("a", "b")),
    ("open think", "a</think>b", text("b", "a")),
    ("qwen3", "<think>\na\n</think>\n\nb", text("\n\nb", "\na\n")),
    ("qwen3", "a <think>b</think>", text("a <think>b</think>")),
    ("deepseek_r1", "a</think>b</think>", text("b</think>", "a")),
    ("deepseek_r1", "<think>a</think>b", text("b", "a")),
    ("deepseek_r1", "a <", text(None, "a <")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "output", "expected"), CASES, ids=lambda v: str(v)[:30])
def test_an_output_is_parsed_whole(name: str, output: str, expected: ParsedOutput) -> None:
    assert PARSERS[name]().parse(output) == expected


def streamed(parser: Any, pieces: list[str]) -> ParsedOutput:
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    for delta in deltas:
        assert [bool(delta.content), bool(delta.reasoning), bool(delta.tool_call)].count(True) == 1
    return collect(deltas)


@pytest.mark.parametrize(("name", "output", "expected"), CASES, ids=lambda v: str(v)[:30])
def test_an_output_is_the_same_character_by_character_and_cut_anywhere_once(
    name: str, output: str, expected: ParsedOutput
) -> None:
    assert streamed(PARSERS[name](), list(output)) == expected
    for cut in range(len(output)):
        assert streamed(PARSERS[name](), [output[:cut], output[cut:]]) == expected


FRAGMENTS = sorted(
    {
        *itertools.chain.from_iterable((output, *output.split(">")) for _, output, _ in CASES),
        *("<", ">", "{", "}", "[", "]", '"', ":", ",", "\\", " ", "\n", "(", ")", "=", "'", ";"),
        *('"name"', '"arguments"', '{"name": "f"', "<tool_call>", "</tool_call>", "<function=f>"),
        *("<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|message|>", "<|end|>"),
        *("<parameter=a>", "</parameter>", "</function>", ds.CALL_BEGIN, ds.SEPARATOR, ds.CALL_END),
        *("null", "1e5", "true", "to=functions.f", "f(a=1)", "é", "😀"),
    }
)  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=12), seed=st.integers(0, 2**32 - 1))
def test_the_pieces_of_any_text_add_up_to_the_whole_however_it_is_cut(
    name: str, fragments: list[str], seed: int
) -> None:
    output = "".join(fragments)
    rng = random.Random(seed)
    cuts = sorted(rng.choices(range(len(output) + 1), k=rng.randint(0, 20)))
    pieces = [output[a:b] for a, b in itertools.pairwise([0, *cuts, len(output)])]
    assert streamed(PARSERS[name](), pieces) == PARSERS[name]().parse(output)


STAGES = list(
    itertools.product(
        [
            "",
            "hermes",
            "llama3_json",
            "mistral",
            "pythonic",
            "qwen3_coder",
            "deepseek_v3",
            "openai",
        ],
        ["", "deepseek_r1", "qwen3", "think"],
    )
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    names=st.sampled_from(STAGES),
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_reasoning_and_tool_parsers_together_do_not_mind_where_an_output_is_cut(
    names: tuple[str, str], fragments: list[str], seed: int
) -> None:
    def without_ids(output: ParsedOutput) -> tuple:
        named = [(call.name, call.arguments) for call in output.tool_calls]
        return output.content, output.reasoning, named

    def new() -> OutputParser:
        choice = ToolChoice("auto")
        return OutputParser(
            tool_parser=names[0], reasoning_parser=names[1], tools=TOOLS, tool_choice=choice
        )

    output = "".join(fragments)
    rng = random.Random(seed)
    cuts = sorted(rng.choices(range(len(output) + 1), k=rng.randint(0, 20)))
    pieces = [output[a:b] for a, b in itertools.pairwise([0, *cuts, len(output)])]
    assert without_ids(streamed(new(), pieces)) == without_ids(new().parse(output))


def test_a_call_comes_as_soon_as_its_name_is_known_and_its_arguments_as_they_are_written() -> None:
    parser = HermesParser(counted())
    seen = [
        [(d.tool_call.name, d.tool_call.arguments) for d in parser.feed(piece) if d.tool_call]
        for piece in ("Hi<tool_call>", '{"name": "f"', ', "arguments": {"a', '": [1,', " 2]}", "}")
    ]
    assert seen == [[], [("f", "")], [(None, '{"a')], [(None, '": [1,')], [(None, " 2]}")], []]


def test_content_is_held_back_only_while_it_may_become_a_marker() -> None:
    parser = HermesParser()
    found = [
        "".join(d.content for d in parser.feed(piece)) for piece in ("ab <to", "ol", "x>", " ")
    ]
    assert found == ["ab", "", " <toolx>", ""]
    assert [d.content for d in parser.finish()] == [" "]


def test_reasoning_comes_before_the_calls_and_a_call_in_it_is_none() -> None:
    output = f"<think>I could <tool_call>{F}</tool_call></think>\n<tool_call>{G}</tool_call>"
    parser = OutputParser(
        tool_parser="hermes", reasoning_parser="qwen3", tool_choice=ToolChoice("auto")
    )
    parsed = parser.parse(output)
    assert parsed.reasoning == f"I could <tool_call>{F}</tool_call>"
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("g", '{"b": [1, "}"]}')]
    assert parsed.content is None or not parsed.content.strip()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|assistant|><think>\n", text("b", "a")),
        ("<|assistant|><think>\n\n</think>\n\n", text("a</think>b")),
        ("<|assistant|>", text("a</think>b")),
    ],
)
def test_the_prompt_says_whether_reasoning_has_begun(prompt: str, expected: ParsedOutput) -> None:
    assert OutputParser(reasoning_parser="qwen3", prompt=prompt).parse("a</think>b") == expected
    assert prompt_leaves_open(prompt) == (expected.reasoning is not None)
    assert prompt_closes(prompt) == ("</think>" in prompt)


def test_without_tools_calls_are_content() -> None:
    output = f"<tool_call>{F}</tool_call>"
    assert OutputParser(tool_parser="hermes").parse(output).content == output


def test_a_choice_of_the_request_overrides_the_models_own_notation() -> None:
    named = OutputParser(tool_parser="hermes", tool_choice=ToolChoice("named", "g")).parse("{}")
    assert [(call.name, call.arguments) for call in named.tool_calls] == [("g", "{}")]
    required = OutputParser(tool_parser="hermes", tool_choice=ToolChoice("required"))
    parsed = required.parse('[{"name": "g", "parameters": {}}]')
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("g", "{}")]


def test_only_markers_that_are_special_tokens_need_them_in_the_text() -> None:
    def needs(tool_parser: str) -> bool:
        return OutputParser(
            tool_parser=tool_parser, tool_choice=ToolChoice("auto")
        ).needs_special_tokens

    assert [needs(name) for name in ("hermes", "mistral", "deepseek_v3", "openai")] == [
        *(False, True, True, True)
    ]


def test_ids_have_the_forms_that_clients_and_templates_take() -> None:
    (call,) = HermesParser().parse(f"<tool_call>{F}").tool_calls
    assert len(call.id) == 29
    assert call.id.startswith("call_")
    assert len(new_mistral_id()) == 9
    assert new_mistral_id().isalnum()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("magic", ""), "--tool-call-parser is 'magic'; known are hermes, llama3_json"),
        (("", "magic"), "--reasoning-parser is 'magic'; known are deepseek_r1, qwen3, think"),
    ],
)
def test_an_unknown_parser_is_refused_by_its_flag(names: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parsers(*names)


def test_arguments_of_a_call_are_the_models_own_text() -> None:
    arguments = '{ "a" : 1.0 ,"b":"\\u00e9" }'
    (call,) = HermesParser().parse(f'<tool_call>{{"name":"f","arguments":{arguments}}}').tool_calls
    assert call.arguments == arguments
    assert json.loads(call.arguments) == {"a": 1.0, "b": "é"}
