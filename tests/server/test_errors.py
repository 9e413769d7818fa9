"""What is refused, and with which words; keys, limits, and clients that go away."""

import asyncio
import json
from typing import Any

import pytest

from jaxengine import LLM, AsyncLLM
from tests.server.asgi import AsgiClient
from tests.server.conftest import NewClient

PROMPT = {"prompt": "the quick brown fox", "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
KEYED = ["/v1/models", "/metrics", "/load", "/docs", "/openapi.json", "/v1/responses/x", "/nothing"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", PROMPT),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {**CHAT, "max_tokens": 4}),
        ("/tokenize", {"prompt": "hello"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_an_unknown_model_is_not_found(client: AsgiClient, path: str, body: Any) -> None:
    answer = client.post(path, {**body, "model": "huge"})
    assert answer.status == 404
    assert answer.error["type"] == "NotFoundError"
    assert answer.error["param"] == "model"
    assert "`huge`" in answer.error["message"]
    assert client.post(path, {**body, "model": "also-tiny"}).status == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_prompt_that_is_too_long_is_refused_before_a_stream(
    client: AsgiClient, streams: bool
) -> None:
    answer = client.post("/v1/completions", {**PROMPT, "prompt": [5] * 300, "stream": streams})
    assert answer.status == 400
    assert "300" in answer.error["message"]
    assert "256" in answer.error["message"]
    assert answer.error["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("max_tokens", -1),
        ("n", 0),
        ("stop_token_ids", [-1]),
        ("seed", 2**63),
        ("prompt", {"text": "a"}),
        ("prompt", None),
    ],
)
def test_a_bad_field_is_named(client: AsgiClient, field: str, value: Any) -> None:
    answer = client.post("/v1/completions", {**PROMPT, field: value})
    assert answer.status == 400
    assert answer.error["type"] == "BadRequestError"
    assert answer.error["param"].startswith(field)
    assert field in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"", 400, "required"),
        (b"[]", 400, "dictionary"),
        (b'{"prompt": [99999]}', 400, "99999"),
        (b'{"prompt": []}', 400, "prompt"),
        (b'{"prompt": ""}', 400, "empty"),
        (b'{"prompt": "a", "n": 129}', 400, "--max-n"),
        (b'{"prompt": "a", "stop": %s}' % json.dumps(["x"] * 17).encode(), 400, "--max-stop"),
        (b'{"prompt": "a", "stream_options": {}}', 400, "stream"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "logit_bias"),
        (b'{"prompt": "a", "guided_regex": "("}', 400, "regex"),
    ],
)
def test_what_is_impossible_is_said(
    client: AsgiClient, body: bytes, status: int, word: str
) -> None:
    answer = client.request("POST", "/v1/completions", parts=[body])
    assert answer.status == status
    assert word in answer.error["message"]


def test_paths_and_methods_that_are_not_there(client: AsgiClient) -> None:
    # The page's files, which are looked for at the end, know GET alone.
    for method, path in (("POST", "/v1/nothing"), ("GET", "/nothing"), ("GET", "/v1/completions")):
        answer = client.request(method, path)
        assert answer.status == 404
        assert answer.error["type"] == "NotFoundError"


@pytest.mark.parametrize("says_its_length", [False, True])
def test_a_body_that_is_too_long_is_not_read(new_client: NewClient, says_its_length: bool) -> None:
    client = new_client(max_request_body_bytes=1000)
    parts = [b" " * 400] * 5
    headers = {"content-length": "2000"} if says_its_length else {}
    answer = client.request("POST", "/v1/completions", parts=parts, headers=headers)
    assert answer.status == 413
    assert "1000 bytes" in answer.error["message"]
    assert "--max-request-body-bytes" in answer.error["message"]
    assert client.post("/v1/completions", {**PROMPT, "max_tokens": 1}).status == 200


def test_a_body_that_does_not_come_is_given_up(new_client: NewClient) -> None:
    client = new_client(request_timeout_s=0.05)

    async def half_a_request() -> list[int]:
        sent: list[Any] = []
        first = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> Any:
            if first:
                return first.pop()
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await client.app(scope, receive, send)
        return [message["status"] for message in sent if "status" in message]

    assert client.runner.run(half_a_request()) == [408]


def test_a_body_must_be_json(client: AsgiClient) -> None:
    headers = {"content-type": "text/plain"}
    answer = client.request("POST", "/v1/completions", parts=[b"{}"], headers=headers)
    assert answer.status == 415
    assert "application/json" in answer.error["message"]


@pytest.mark.parametrize("path", KEYED)
def test_a_key_is_asked_for(new_client: NewClient, path: str) -> None:
    client = new_client(api_key=["secret", "other"])
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        answer = client.get(path, headers=headers)
        assert answer.status == 401
        assert answer.error["type"] == "AuthenticationError"
    for headers in (
        {"authorization": "Bearer secret"},
        {"authorization": "bearer other"},
        {"x-api-key": "secret"},
    ):
        assert client.get(path, headers=headers).status in (200, 404)


@pytest.mark.parametrize(
    "path",
    ["completions", "chat/completions", "responses", "messages", "messages/count_tokens"],
)
def test_a_key_is_asked_for_by_what_generates(new_client: NewClient, path: str) -> None:
    assert new_client(api_key=["secret"]).post(f"/v1/{path}", {}).status == 401


def test_health_and_the_page_need_no_key(new_client: NewClient) -> None:
    client = new_client(api_key=["secret"])
    for path in ("/health", "/ping", "/version", "/", "/page.js"):
        assert client.get(path).status == 200
    assert client.post("/ping").status == 200
    assert client.post("/page.js").status == 401


def test_the_key_of_the_environment_counts(
    new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-there")
    client = new_client()
    assert client.get("/v1/models").status == 401
    headers = {"authorization": "Bearer from-there"}
    assert client.get("/v1/models", headers=headers).status == 200


def test_a_full_queue_is_a_503_to_try_again(new_client: NewClient) -> None:
    client = new_client(max_num_queued_tokens=3)
    answer = client.post("/v1/completions", PROMPT)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert "max_num_queued_tokens is 3" in answer.error["message"]
    rejections = [
        line for line in client.get("/metrics").body.decode().split("\n") if "rejec" in line
    ]
    assert any(line.endswith(" 1.0") for line in rejections)


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_frees_what_it_held(
    served: AsyncLLM, client: AsgiClient, streams: bool
) -> None:
    body = {**PROMPT, "max_tokens": 200, "stream": streams}

    async def leave() -> tuple[Any, int]:
        gone = asyncio.Event()
        asking = asyncio.ensure_future(
            client.send("POST", "/v1/completions", values=body, leave=gone)
        )
        while not (await served.call("stats")).num_held_blocks:
            await asyncio.sleep(0.005)
        gone.set()
        answer = await asking
        num_unfinished = served.num_unfinished
        while (await served.call("stats")).num_held_blocks:
            await asyncio.sleep(0.005)
        return answer, num_unfinished

    answer, num_unfinished = client.runner.run(asyncio.wait_for(leave(), 20))
    assert num_unfinished == 0
    assert not answer.is_whole if streams else answer.status == 499


@pytest.mark.parametrize("streams", [False, True])
def test_a_step_that_fails_is_told_and_the_next_request_served(
    llm: LLM, client: AsgiClient, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, fails = llm.engine.step, [True]

    def fail_once() -> Any:
        if fails:
            fails.pop()
            llm.engine.give_up_steps()
            raise MemoryError("no room on the device")
        return step()

    monkeypatch.setattr(llm.engine, "step", fail_once)
    answer = client.post("/v1/completions", {**PROMPT, "stream": streams})
    if streams:
        error = answer.chunks[-1]["error"]
    else:
        assert answer.status == 500
        error = answer.error
    assert "no room on the device" in error["message"]
    assert error["code"] == 500
    assert client.post("/v1/completions", {**PROMPT, "max_tokens": 1}).status == 200


def test_a_server_that_drains_takes_nothing_new(client: AsgiClient) -> None:
    client.state.is_draining = True
    answer = client.post("/v1/completions", PROMPT)
    assert answer.status == 503
    assert "about to end" in answer.error["message"]
