"""/v1/responses: create, continue, stream, retrieve, cancel, delete."""

import time
from typing import Any

from tests.server.asgi import AsgiClient
from tests.server.conftest import NewClient
from tests.server.test_chat import GREEDY, SCHEMA, TOOLS, is_as_the_schema_says

CHOICE = {"temperature": 0, "max_output_tokens": 8}


def create(client: AsgiClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/responses", {"input": "once upon a time", **CHOICE, **fields})
    assert answer.status == 200, answer.body
    return dict(answer.json())


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def test_a_response_is_the_chats_answer_and_can_be_read_again(client: AsgiClient) -> None:
    response = create(client)
    messages = [{"role": "user", "content": "once upon a time"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    chat = client.post("/v1/chat/completions", body).json()
    assert text_of(response) == chat["choices"][0]["message"]["content"]
    assert response["object"] == "response"
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert response["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    is_cut = chat["choices"][0]["finish_reason"] == "length"
    assert response["status"] == ("incomplete" if is_cut else "completed")
    assert client.get(f"/v1/responses/{response['id']}").json() == response


def test_a_next_turn_continues_the_conversation(client: AsgiClient) -> None:
    first = create(client)
    second = create(client, input="and then", previous_response_id=first["id"])
    items = [
        {"role": "user", "content": "once upon a time"},
        *first["output"],
        {"role": "user", "content": "and then"},
    ]
    spelt_out = create(client, input=items)
    assert second["usage"]["input_tokens"] == spelt_out["usage"]["input_tokens"]
    assert text_of(second) == text_of(spelt_out)
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    third = create(client, input="more", previous_response_id=second["id"])
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]


def test_the_events_of_a_stream_build_the_response(client: AsgiClient) -> None:
    body = {"input": "once upon a time", **CHOICE, "stream": True}
    events = client.post("/v1/responses", body).named_events
    names = [name for name, _ in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in ("response.completed", "response.incomplete")
    assert all(values["type"] == name for name, values in events)
    assert [values["sequence_number"] for _, values in events] == list(range(len(events)))
    pieces = [v["delta"] for name, v in events if name == "response.output_text.delta"]
    (done,) = [v["text"] for name, v in events if name == "response.output_text.done"]
    response = events[-1][1]["response"]
    assert "".join(pieces) == done == text_of(response) == text_of(create(client))
    opened = [v["item"]["id"] for name, v in events if name == "response.output_item.added"]
    assert opened == [item["id"] for item in response["output"]]
    assert client.get(f"/v1/responses/{response['id']}").json() == response


def test_a_form_and_a_function_are_held_to(client: AsgiClient) -> None:
    described = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    sampled = {"temperature": 1.0, "seed": 0, "max_output_tokens": 200}
    assert is_as_the_schema_says(text_of(create(client, text=described, **sampled)))
    tool = {"type": "function", **TOOLS[0]["function"]}
    choice = {"type": "function", "name": "look_up"}
    (item,) = create(client, tools=[tool], tool_choice=choice, **sampled)["output"]
    assert item["type"] == "function_call"
    assert item["name"] == "look_up"
    assert is_as_the_schema_says(item["arguments"])


def test_what_is_not_stored_is_not_found(client: AsgiClient) -> None:
    response = create(client, store=False)
    for answer in (
        client.get(f"/v1/responses/{response['id']}"),
        client.request("DELETE", "/v1/responses/resp-none"),
        client.post("/v1/responses", {"input": "a", "previous_response_id": "resp-none"}),
    ):
        assert answer.status == 404
        assert "no stored response" in answer.error["message"]


def test_a_deleted_response_is_gone(client: AsgiClient) -> None:
    name = create(client)["id"]
    deleted = client.request("DELETE", f"/v1/responses/{name}")
    assert deleted.json() == {"id": name, "object": "response", "deleted": True}
    assert client.get(f"/v1/responses/{name}").status == 404


def test_the_oldest_responses_go_first(new_client: NewClient) -> None:
    client = new_client(max_stored_responses=2)
    names = [create(client)["id"] for _ in range(3)]
    assert [client.get(f"/v1/responses/{n}").status for n in names] == [404, 200, 200]


def test_a_response_in_the_background_comes_later(client: AsgiClient) -> None:
    begun = create(client, background=True)
    assert begun["status"] == "in_progress"
    deadline = time.monotonic() + 20
    while (now := client.get(f"/v1/responses/{begun['id']}").json())["status"] == "in_progress":
        assert time.monotonic() < deadline
    assert text_of(now) == text_of(create(client))


def test_a_response_in_the_background_can_be_cancelled(client: AsgiClient) -> None:
    begun = create(client, background=True, max_output_tokens=230)
    path = f"/v1/responses/{begun['id']}"
    assert client.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert client.get(path).json()["status"] == "cancelled"
    whole = create(client)
    refused = client.post(f"/v1/responses/{whole['id']}/cancel")
    assert refused.status == 400
    assert "background" in refused.error["message"]


def test_what_is_impossible_is_said(client: AsgiClient) -> None:
    for fields, word in (
        ({"background": True, "stream": True}, "exclude"),
        ({"background": True, "store": False}, "store"),
        ({"input": [{"type": "picture"}]}, "picture"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ):
        answer = client.post("/v1/responses", {"input": "a", **GREEDY, **fields})
        assert answer.status == 400
        assert word in answer.error["message"]
