"""Messages as clients send them, in the form that templates expect."""

from pathlib import Path

import pytest

from jaxengine.text.messages import (
    find_content_format,
    load_chat_template,
    normalize_messages,
    split_conversations,
)

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def contents(messages, template=PLAIN, **options):
    return [m["content"] for m in normalize_messages(messages, template, **options)]


def test_parts_are_joined_by_line_breaks_where_a_template_wants_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert contents([{"role": "user", "content": parts}]) == ["a\nb\nc"]
    assert contents([{"role": "user", "content": "x"}]) == ["x"]


def test_text_becomes_a_part_where_a_template_walks_over_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "x"}]
    assert contents(messages, PARTS) == [parts, [{"type": "text", "text": "x"}]]
    assert contents(messages, PARTS, content_format="string") == ["a\nb", "x"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": []},
    ],
    ids=str,
)
def test_absent_content_is_empty(message) -> None:
    assert contents([message]) == [""]
    assert contents([message], PARTS) == [[]]


def test_a_tools_answer_is_text_in_every_template() -> None:
    message = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}
    (normal,) = normalize_messages([message], PARTS)
    assert normal == {"role": "tool", "tool_call_id": "1", "content": "4"}


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"a": {"b": 1}}', {"a": {"b": 1}}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("not JSON", {}),
        ("[1]", {}),
    ],
)
def test_arguments_of_a_tool_call_are_a_dict(arguments, parsed) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (normal,) = normalize_messages([message], PLAIN)
    assert normal["tool_calls"][0]["function"] == {"name": "f", "arguments": parsed}
    assert call["function"]["arguments"] == arguments, "the caller's message stays as it was"


@pytest.mark.parametrize("calls", [None, []])
def test_no_tool_calls_are_no_key(calls) -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": calls}
    assert normalize_messages([message], PLAIN) == [{"role": "assistant", "content": "x"}]


def test_reasoning_is_shown_under_both_of_its_names() -> None:
    (normal,) = normalize_messages([{"role": "assistant", "content": "x", "reasoning": "r"}], PLAIN)
    assert normal["reasoning_content"] == normal["reasoning"] == "r"


def test_a_developer_speaks_as_the_system_unless_the_template_knows_developers() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert normalize_messages(messages, PLAIN)[0]["role"] == "system"
    assert normalize_messages(messages, PLAIN + "{# 'developer' #}")[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ("hi", "message 0 must be a dict with a 'role'"),
        ({"content": "hi"}, "message 0 must be a dict with a 'role'"),
        ({"role": "user", "content": 5}, "content must be text or a list of parts, got 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "reads text only"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "content part is 5"),
        ({"role": "assistant", "tool_calls": ["f"]}, "a tool call must be"),
    ],
    ids=str,
)
def test_what_is_no_message_is_refused_by_its_number(message, match) -> None:
    with pytest.raises(ValueError, match=match):
        normalize_messages([message], PLAIN)


def test_one_conversation_and_several_are_told_apart() -> None:
    message = {"role": "user", "content": "x"}
    assert split_conversations([message]) == [[message]]
    assert split_conversations([[message], (message, message)]) == [[message], [message] * 2]
    assert split_conversations([]) == []
    with pytest.raises(ValueError, match="conversation 1 has no messages"):
        split_conversations([[message], []])
    for wrong in ("hi", message, None, ["hi"]):
        with pytest.raises(ValueError, match="must be a list of"):
            split_conversations(wrong)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "string"),
        (PARTS, "openai"),
        ("{% for x in m['content'] | list %}{{ x }}{% endfor %}", "openai"),
        ("{% set content = m.content %}{% for x in content %}{{ x }}{% endfor %}", "openai"),
        ("{% set body = m.content[1:] %}{% for x in body %}{{ x }}{% endfor %}", "openai"),
        ("{% macro f(c) %}{% for x in c %}{% endfor %}{% endmacro %}{{ f(m.content) }}", "openai"),
        ("{% for m in messages %}{% break %}{{ m.content }}{% endfor %}", "string"),
        ("{% generation %}{{ m.content }}{% endgeneration %}", "string"),
    ],
)  # fmt: skip
def test_the_content_format_is_read_from_the_template(template, expected) -> None:
    assert find_content_format(template) == expected


def test_a_template_is_given_as_its_source_or_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(PLAIN)
    assert load_chat_template(PLAIN) == PLAIN
    assert load_chat_template(file) == load_chat_template(str(file)) == PLAIN
    assert load_chat_template(None) is None
    with pytest.raises(ValueError, match="neither a Jinja template nor a file"):
        load_chat_template("missing.jinja")
