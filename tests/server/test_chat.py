"""/v1/chat/completions: conversations, tools and forms; streamed and not."""

import json
from typing import Any

import pytest

from jaxengine import LLM, AsyncLLM
from tests.helpers import greedy
from tests.server.asgi import AsgiClient
from tests.server.conftest import NewClient

MESSAGES = [{"role": "user", "content": "once upon a time"}]
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
SCHEMA = {
    "type": "object",
    "properties": {"fine": {"type": "boolean"}, "animal": {"enum": ["fox", "dog"]}},
    "required": ["fine", "animal"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "give_up", "parameters": SCHEMA}},
]


@pytest.fixture
def no_spaces(served: AsyncLLM) -> dict[str, float]:
    """A logit bias: a random model would fill JSON with spaces."""
    vocabulary = served.frontend.require_tokenizer().hf_tokenizer.get_vocab()
    return {str(token_id): -100.0 for text, token_id in vocabulary.items() if "Ġ" in text}


def chat(client: AsgiClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "max_tokens": 12, **GREEDY, **fields}
    answer = client.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return dict(answer.json())


def stream(client: AsgiClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": MESSAGES, "max_tokens": 12, "stream": True, **GREEDY, **fields}
    return client.post("/v1/chat/completions", body).chunks


def deltas(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["delta"] for choice in choices if choice["index"] == index]


def content(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(delta.get("content") or "" for delta in deltas(chunks, index))


def is_as_the_schema_says(text: str) -> bool:
    values = json.loads(text)
    is_whole = set(values) == {"fine", "animal"} and values["animal"] in ("fox", "dog")
    return is_whole and isinstance(values["fine"], bool)


def test_an_answer_is_what_chat_gives(llm: LLM, client: AsgiClient) -> None:
    (output,) = llm.chat(MESSAGES, greedy(12), use_tqdm=False)
    answer = chat(client, ignore_eos=True)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == output.outputs[0].text
    assert choice["message"]["tool_calls"] == []
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 12


def test_the_deltas_of_a_stream_join_to_the_answer(client: AsgiClient) -> None:
    fields = {"n": 2, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    whole = chat(client, **fields)
    chunks = stream(client, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 24
    for index, choice in enumerate(whole["choices"]):
        assert content(chunks, index) == choice["message"]["content"]
        assert deltas(chunks, index)[0] == {"role": "assistant", "content": ""}
        reasons = [
            each["finish_reason"]
            for chunk in chunks
            for each in chunk["choices"]
            if each["index"] == index
        ]
        assert reasons == [*([None] * (len(reasons) - 1)), choice["finish_reason"]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_max_completion_tokens_is_the_newer_name(client: AsgiClient) -> None:
    answer = chat(client, max_completion_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3


def test_without_a_length_an_answer_may_fill_the_model(client: AsgiClient) -> None:
    answer = chat(client, max_tokens=None, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 256


def test_content_may_come_in_parts(client: AsgiClient) -> None:
    parts = [{"type": "text", "text": "once upon"}, {"type": "text", "text": " a time"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}])
    assert answer["choices"][0]["message"]["content"]
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    refused = client.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": image}]}
    )
    assert refused.status == 400
    assert "image" in refused.error["message"]


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_hold_the_most_likely_tokens(client: AsgiClient, streams: bool) -> None:
    fields = {"max_tokens": 4, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}
    if streams:
        parts = [c["choices"][0]["logprobs"] for c in stream(client, **fields)]
        entries = [entry for part in parts if part for entry in part["content"]]
    else:
        entries = chat(client, **fields)["choices"][0]["logprobs"]["content"]
    assert len(entries) == 4
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert bytes(entry["bytes"]).decode() == entry["token"]
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("streams", [False, True])
def test_a_json_schema_is_held_to(
    client: AsgiClient, no_spaces: dict[str, float], streams: bool
) -> None:
    described = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    fields = {"response_format": described, "max_tokens": 120, "logit_bias": no_spaces}
    if streams:
        text = content(stream(client, **fields))
    else:
        choice = chat(client, **fields)["choices"][0]
        assert choice["finish_reason"] == "stop"
        text = choice["message"]["content"]
    assert is_as_the_schema_says(text)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "give_up"}}]
)
def test_a_tool_that_is_demanded_is_called(
    client: AsgiClient, no_spaces: dict[str, float], choice: Any, streams: bool
) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200}
    fields |= {"logit_bias": no_spaces, "parallel_tool_calls": False}
    if streams:
        chunks = stream(client, **fields)
        parts = [part for delta in deltas(chunks) for part in delta.get("tool_calls", [])]
        assert {part["index"] for part in parts} == {0}
        name, call_id = parts[0]["function"]["name"], parts[0]["id"]
        arguments = "".join(part["function"]["arguments"] for part in parts)
        reason = chunks[-1]["choices"][0]["finish_reason"]
        assert content(chunks) == ""
    else:
        answer = chat(client, **fields)["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        name, call_id = call["function"]["name"], call["id"]
        arguments, reason = call["function"]["arguments"], answer["finish_reason"]
        assert not answer["message"]["content"]
    assert name in ("look_up", "give_up") if choice == "required" else name == "give_up"
    assert call_id
    assert is_as_the_schema_says(arguments)
    assert reason == ("tool_calls" if choice == "required" else "stop")


def test_calls_that_the_model_writes_itself_are_read(new_client: NewClient) -> None:
    client = new_client(enable_auto_tool_choice=True, tool_call_parser="hermes")
    call = '<tool_call>{"name": "look_up", "arguments": {"fine": true}}</tool_call>'
    fields = {
        "tools": TOOLS,
        "max_tokens": 120,
        "structured_outputs": {"choice": [call]},  # for a model that knows no tools
    }
    choice = chat(client, **fields)["choices"][0]
    (read,) = choice["message"]["tool_calls"]
    assert read["function"] == {"name": "look_up", "arguments": '{"fine": true}'}
    assert choice["finish_reason"] == "tool_calls"
    parts = [p for d in deltas(stream(client, **fields)) for p in d.get("tool_calls", [])]
    assert "".join(part["function"]["arguments"] for part in parts) == '{"fine": true}'


@pytest.mark.parametrize("streams", [False, True])
def test_reasoning_is_kept_apart(new_client: NewClient, streams: bool) -> None:
    client = new_client(reasoning_parser="deepseek_r1")
    fields = {"structured_outputs": {"choice": ["so it is</think>fine"]}, "max_tokens": 60}
    if streams:
        pieces = deltas(stream(client, **fields))
        names = ("reasoning", "reasoning_content", "content")
        said = {name: "".join(each.get(name) or "" for each in pieces) for name in names}
    else:
        said = chat(client, **fields)["choices"][0]["message"]
    assert said["reasoning"] == said["reasoning_content"] == "so it is"
    assert said["content"] == "fine"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "a"}]}, "role"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "--enable-auto-tool-choice"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "fly"}}}, "fly"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"chat_template": "x"}, "--trust-request-chat-template"),
        ({"response_format": {"type": "poem"}}, "poem"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_impossible_is_said(client: AsgiClient, fields: Any, word: str) -> None:
    answer = client.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert answer.status == 400
    assert word in answer.error["message"]
