"""chat and complete against a server that is not ours."""

import http.server
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxengine.cli import main as cli
from jaxengine.cli.remote import RemoteChat, RemoteModel, base_url
from jaxengine.cli.server_sent_events import EventReader, RemoteError
from tests.cli.test_main import FakeLLM


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the events that its server holds, cut into pieces of seven bytes."""

    server: Any

    def do_GET(self) -> None:
        self._send(self.server.models_status, json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        self._send(self.server.status, self.server.answer)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        for start in range(0, len(body), 7):
            self.wfile.write(body[start : start + 7])
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.status, server.models_status = [], 200, 200
    server.models = {"data": [{"id": "first"}, {"id": "second"}]}
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.answer = b""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def events(*choices: dict[str, Any], done: bool = True) -> bytes:
    lines = [json.dumps({"choices": [each]}, ensure_ascii=False) for each in choices]
    text = ": a comment\n\n" + "".join(f"data: {line}\r\n\r\n" for line in lines)
    return (text + ("data: [DONE]\n\n" if done else "")).encode()


def test_complete_streams_the_first_models_text_whatever_ends_lines_elsewhere(
    server: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.answer = events({"text": "a\u2028b"}, {"text": "\x85ü\n"}, {"text": "end"})
    status = cli.main(
        ["complete", "--url", server.url, "--max_tokens", "7", "--stop", "x", "--", "Hi"]
    )
    assert status == 0
    assert capsys.readouterr().out == "a\u2028b\x85ü\nend\n"
    path, body, key = server.seen[0]
    assert (path, key) == ("/v1/completions", None)
    wanted = {"model": "first", "prompt": "Hi", "max_tokens": 7, "stop": ["x"], "stream": True}
    assert body == wanted


def test_complete_takes_its_prompt_from_a_pipe(
    server: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = events({"text": "!"})
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert cli.main(["complete", f"--url={server.url}/v1/", "--model-name", "second"]) == 0
    path, body, _ = server.seen[0]
    assert (path, body["prompt"], body["model"]) == ("/v1/completions", "from a pipe", "second")


def test_chat_keeps_the_conversation_and_sends_the_key(server: Any) -> None:
    server.answer = events(
        {"delta": {"role": "assistant"}},
        {"delta": {"content": "Hel"}},
        {"delta": {"content": "lo"}},
    )
    written: list[str] = []
    model = RemoteModel(server.url, api_key="secret")
    chat = RemoteChat(model, system_prompt="Be kind.", write=written.append)
    chat.say("Hi")
    chat.say("More")
    assert "".join(written) == "Hello\nHello\n"
    path, body, key = server.seen[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert [m["content"] for m in body["messages"]] == ["Be kind.", "Hi", "Hello", "More"]


def test_chat_with_quick_says_one_thing_with_the_key_of_the_environment(
    server: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    server.answer = events({"delta": {"content": "Yes."}})
    assert cli.main(["chat", "--url", server.url, "-q", "Well?"]) == 0
    assert capsys.readouterr().out == "Yes.\n"
    assert server.seen[0][2] == "Bearer of the environment"


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (401, b'{"error": {"message": "no key"}}', "answered 401: no key: give --api-key"),
        (404, b'{"detail": "Not Found"}', "answered 404: Not Found"),
        (502, b"<html>bad gateway", "answered 502: <html>bad gateway"),
        (200, b'data: {"error": {"message": "it failed"}}\n\n', "the server says: it failed"),
        (200, b"data: {half\n\n", "an event that is not JSON"),
        (200, events({"text": "a"}, done=False), "the stream broke off before its end"),
    ],
)
def test_what_the_server_says_is_shown(
    server: Any, capsys: Any, status: int, answer: bytes, message: str
) -> None:
    server.status, server.answer = status, answer
    assert cli.main(["complete", "--url", server.url, "Hi"]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there_or_lists_nothing_is_named(server: Any, capsys: Any) -> None:
    server.models = {"data": []}
    assert cli.main(["chat", "--url", server.url, "-q", "Hi"]) == 2
    assert "/v1/models lists no model: name one with --model-name" in capsys.readouterr().err
    assert cli.main(["chat", "--url", "http://127.0.0.1:9", "-q", "Hi"]) == 2
    assert "http://127.0.0.1:9/v1/models: " in capsys.readouterr().err
    assert cli.main(["chat", "--url", "localhost:8000", "-q", "Hi"]) == 2
    assert "must be http://HOST:PORT" in capsys.readouterr().err


def test_an_error_leaves_the_conversation_as_it_was(server: Any) -> None:
    server.status, server.answer = 400, b'{"error": {"message": "too long"}}'
    chat = RemoteChat(RemoteModel(server.url))
    with pytest.raises(RemoteError, match="too long"):
        chat.say("Hi")
    assert chat.messages == []


def test_a_bare_address_means_v1_and_a_path_stays() -> None:
    assert base_url("http://h:1") == base_url("http://h:1/") == "http://h:1/v1"
    assert base_url("https://h/api/openai/v1/") == "https://h/api/openai/v1"


def test_events_are_whole_however_they_are_cut() -> None:
    data, reader = events({"text": "ü"}, {"text": "b"}), EventReader()
    found = [each for i in range(len(data)) for each in reader.feed(data[i : i + 1])]
    assert [each["choices"][0]["text"] for each in found] == ["ü", "b"]
    assert reader.is_done


def test_complete_with_a_model_streams_it_here(capsys: Any) -> None:
    FakeLLM.made.clear()
    arguments = ["complete", "m", "--temperature", "0", "--dtype", "float32"]
    streamed = FakeLLM.stream
    try:
        FakeLLM.stream = lambda self, prompt, params: (  # type: ignore[method-assign]
            self.calls.append((prompt, params)),
            streamed(self, {"prompt_token_ids": [65]}, params),
        )[1]
        assert cli.main([*arguments, "a prompt"], make_llm=FakeLLM) == 0
    finally:
        FakeLLM.stream = streamed  # type: ignore[method-assign]
    assert capsys.readouterr().out == "Hello!\n"
    (llm,) = FakeLLM.made
    prompt, params = llm.calls[0]
    assert (prompt, params.temperature, params.max_tokens) == ("a prompt", 0, 128)
    assert llm.engine_args == {"dtype": "float32"}
