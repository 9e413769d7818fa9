"""``jaxengine serve`` as processes: starts, answers over HTTP, drains at a signal, ends with its
engine."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 60
SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--num-gpu-blocks-override", "65"]


class Server:
    """A server's process, and what it has written.

    Args:
        arguments: Of Python.
        environment: Besides this process's own.
    """

    def __init__(self, arguments: list[str], **environment: str) -> None:
        local = ["--host", "127.0.0.1", "--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, *arguments, *local],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_for(r"serving .* at \('127.0.0.1', (\d+)\)").group(1))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def log(self) -> str:
        """What the processes have written."""
        return "".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until a line is in the log."""
        deadline = time.monotonic() + LIMIT_S
        while (found := re.search(pattern, self.log)) is None:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return found

    def ask(self, path: str, values: Any = None) -> HTTPResponse:
        """Send a request; return when the answer begins."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        headers = {"Content-Type": "application/json"}
        body = None if values is None else json.dumps(values)
        connection.request("GET" if body is None else "POST", path, body, headers)
        return connection.getresponse()

    def wait_until_closed(self) -> None:
        """Wait until nobody listens."""
        deadline = time.monotonic() + LIMIT_S
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(("127.0.0.1", self.port), LIMIT_S).close()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def engine_pid(self) -> int:
        """The process of the engine: the only child."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)


@contextlib.contextmanager
def serving(arguments: list[str], **environment: str) -> Iterator[Server]:
    server = Server(arguments, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()  # the engine ends when its standard input closes
            server.process.wait()


def fake(model: Path, *flags: str, step_s: float = 0.002) -> Any:
    arguments = ["-m", "tests.server.fake_server", str(model), *SMALL, *flags]
    return serving(arguments, FAKE_STEP_S=str(step_s))


def read_events(response: HTTPResponse) -> list[str]:
    lines = response.read().decode().split("\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_serve_answers_streams_and_ends_at_a_signal(chat_model: Path) -> None:
    flags = [*SMALL, "--served-model-name", "tiny"]
    with serving(["-m", "jaxengine", "serve", str(chat_model), *flags]) as server:
        assert server.ask("/health").status == 200
        assert json.load(server.ask("/v1/models"))["data"][0]["id"] == "tiny"
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "once upon a time"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        whole = json.load(server.ask("/v1/chat/completions", body))
        assert whole["usage"]["completion_tokens"] > 0
        response = server.ask("/v1/chat/completions", {**body, "stream": True})
        assert response.status == 200
        *data, last = read_events(response)
        assert last == "[DONE]"
        pieces = [json.loads(each)["choices"][0]["delta"].get("content") or "" for each in data]
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]
        engine = server.engine_pid()
        assert server.end() == 0, server.log
        wait_until_gone(engine)
        assert "Traceback" not in server.log


def test_the_death_of_the_engine_fails_open_requests_and_ends_the_server(
    chat_model: Path,
) -> None:
    with fake(chat_model, step_s=0.02) as server:
        body = {"prompt": "a", "max_tokens": 240, "ignore_eos": True}
        streamed = server.ask("/v1/completions", {**body, "stream": True})
        streamed.readline()
        answers: list[HTTPResponse] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.ask("/v1/completions", body))
        )
        asking.start()
        time.sleep(0.2)  # for it to be in the engine
        os.kill(server.engine_pid(), signal.SIGKILL)
        asking.join(LIMIT_S)
        assert answers[0].status == 500
        assert "engine" in json.load(answers[0])["error"]["message"]
        errors = [json.loads(each) for each in read_events(streamed) if '"error"' in each]
        assert len(errors) == 1
        assert errors[0]["error"]["code"] == 500
        assert server.process.wait(LIMIT_S) == 1
        assert "the engine is dead, so the server ends" in server.log


@pytest.mark.slow
def test_the_engine_ends_when_the_server_is_killed(chat_model: Path) -> None:
    with fake(chat_model) as server:
        engine = server.engine_pid()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        wait_until_gone(engine)


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_server_and_says_where(chat_model: Path) -> None:
    with fake(chat_model, "--engine-step-timeout-s", "1") as server:
        response = server.ask("/v1/completions", {"prompt": [5, 99], "max_tokens": 1})
        assert response.status == 500
        assert server.process.wait(LIMIT_S) == 1
        server._reader.join(LIMIT_S)
        assert "no step for" in server.log
        assert "fake_engine.py" in server.log


def test_a_signal_lets_the_open_streams_of_all_processes_end(chat_model: Path) -> None:
    with fake(chat_model, "--api-server-count", "2", step_s=0.02) as server:
        server.wait_for(r"(?s)serving .*serving ")
        body = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
        answer = json.load(server.ask("/v1/completions", body))
        assert answer["choices"][0]["token_ids"] == [34, 35, 36]
        streams = []
        for num_tokens in (40, 120, 40, 120):
            asked = {**body, "max_tokens": num_tokens, "stream": True}
            streams.append(server.ask("/v1/completions", asked))
            streams[-1].readline()
        server.process.send_signal(signal.SIGTERM)
        server.wait_until_closed()
        for stream in streams:
            *data, last = read_events(stream)
            assert last == "[DONE]"
            assert json.loads(data[-1])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(LIMIT_S) == 0, server.log


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxengine", "serve", str(tmp_path / "none"), "--port", "0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=LIMIT_S
    )
    assert ended.returncode != 0
    assert "none" in ended.stderr
    assert "Traceback" not in ended.stderr
