"""/v1/messages: Anthropic's form, whole and streamed."""

import functools
import json
from typing import Any

import pytest

from jaxengine.server.parsers import tool_choice
from jaxengine.structured.params import StructuredOutputsParams
from tests.server.asgi import AsgiClient
from tests.server.test_chat import SCHEMA, is_as_the_schema_says

MESSAGES = [{"role": "user", "content": "once upon a time"}]


def send(client: AsgiClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, **fields}
    answer = client.post("/v1/messages", body)
    assert answer.status == 200, answer.body
    return dict(answer.json())


def stream(client: AsgiClient, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "stream": True, **fields}
    return client.post("/v1/messages", body).named_events


def test_a_message_is_the_chats_answer(client: AsgiClient) -> None:
    message = send(client, system="the engine")
    asked = [{"role": "system", "content": "the engine"}, *MESSAGES]
    body = {"messages": asked, "max_tokens": 8, "temperature": 0}
    chat = client.post("/v1/chat/completions", body).json()
    (choice,), usage = chat["choices"], chat["usage"]
    assert message["type"] == "message"
    assert message["role"] == "assistant"
    assert message["content"] == [{"type": "text", "text": choice["message"]["content"]}]
    is_cut = choice["finish_reason"] == "length"
    assert message["stop_reason"] == ("max_tokens" if is_cut else "end_turn")
    counted = message["usage"]
    read = counted["input_tokens"] + counted["cache_read_input_tokens"]
    assert read == usage["prompt_tokens"]
    assert counted["output_tokens"] == usage["completion_tokens"]


def test_the_events_of_a_stream_build_the_message(client: AsgiClient) -> None:
    whole, events = send(client), stream(client)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert all(values["type"] == name for name, values in events)
    text = "".join(v["delta"]["text"] for name, v in events if name == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert events[-2][1]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert events[0][1]["message"]["content"] == []


def test_a_stop_sequence_is_named(client: AsgiClient) -> None:
    text = send(client)["content"][0]["text"]
    stopped = send(client, stop_sequences=[text[3:5]])
    assert stopped["stop_reason"] == "stop_sequence"
    assert stopped["stop_sequence"] == text[3:5]


def test_a_tool_that_is_demanded_is_used(
    client: AsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model would fill JSON with spaces.
    compact = functools.partial(StructuredOutputsParams, disable_any_whitespace=True)
    monkeypatch.setattr(tool_choice, "StructuredOutputsParams", compact)
    fields = {
        "tools": [{"name": "look_up", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 200,
    }
    message = send(client, **fields)
    (block,) = message["content"]
    assert block["type"] == "tool_use"
    assert block["name"] == "look_up"
    assert is_as_the_schema_says(json.dumps(block["input"]))
    assert message["stop_reason"] == "tool_use"
    events = stream(client, **fields)
    pieces = [v["delta"]["partial_json"] for name, v in events if name == "content_block_delta"]
    assert json.loads("".join(pieces)) == block["input"]
    assert events[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_tokens_of_blocks_are_counted_as_they_are_read(client: AsgiClient) -> None:
    blocks = [{"role": "user", "content": [{"type": "text", "text": "once upon a time"}]}]
    counted = client.post("/v1/messages/count_tokens", {"messages": blocks}).json()
    usage = send(client)["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_what_is_impossible_is_said(client: AsgiClient) -> None:
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    for fields, word in (
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": image}, "'image'"),
        ({"tool_choice": {"type": "maybe"}}, "maybe"),
        ({"messages": []}, "messages"),
    ):
        body = {"messages": MESSAGES, "max_tokens": 8, **fields}
        answer = client.post("/v1/messages", body)
        assert answer.status == 400
        assert word in answer.error["message"]
