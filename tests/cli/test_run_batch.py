"""Batch files: answers as over HTTP, errors a line each, and going on after a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxengine.cli import main as cli
from jaxengine.server.batch_file import BatchOutput, parse_request

ENGINE = (
    "--max-num-seqs",
    "2",
    "--max-num-batched-tokens",
    "16",
    "--num-gpu-blocks-override",
    "65",
)


def completion(name: str, prompt: Any = (5, 6, 7), **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 4, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def arguments(model: Path, requests: Path, answers: Path) -> list[str]:
    names = ["-i", str(requests), "-o", str(answers), "--model", str(model)]
    return [*names, "--served-model-name", "tiny", "--no-progress", *ENGINE]


def run(model: Path, requests: Path, answers: Path) -> int:
    return cli.main(["run-batch", *arguments(model, requests, answers)])


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [line["custom_id"] for line in lines]
    assert len(set(names)) == len(names), "an answer stands there twice"
    return {line["custom_id"]: line for line in lines}


def test_answers_are_those_of_the_routes_and_every_error_is_a_line(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of a server that also runs here")
    messages = [{"role": "user", "content": "once upon"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0}
    requests = write(
        tmp_path / "in.jsonl",
        [
            completion("text", "the quick"),
            {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
            "{half",
            completion("no such model", model="other"),
            completion("bad field", max_tokens=-1),
            {**completion("bad url"), "url": "/v1/embeddings"},
            "",
            completion("stream", stream=True),
        ],
    )
    answers = tmp_path / "out.jsonl"
    assert run(chat_model, requests, answers) == 0
    assert "7 answers" in capsys.readouterr().err
    found = read(answers)
    text = found["text"]
    assert text["error"] is None
    assert text["response"]["status_code"] == 200
    assert text["response"]["body"]["object"] == "text_completion"
    assert text["response"]["body"]["usage"]["completion_tokens"] == 4
    assert text["response"]["request_id"] in text["response"]["body"]["id"]
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert found["no such model"]["response"]["status_code"] == 404
    assert found["bad field"]["response"]["status_code"] == 400
    assert "max_tokens" in found["bad field"]["response"]["body"]["error"]["message"]
    assert "/v1/embeddings" in found["bad url"]["error"]["message"]
    assert "stream" in found["stream"]["error"]["message"]
    assert found[None]["response"] is None
    assert found[None]["error"]["line"] == 3
    before = answers.read_bytes()
    assert run(tmp_path / "no model is loaded", requests, answers) == 0
    assert answers.read_bytes() == before, "everything was answered"


def test_a_killed_run_goes_on_and_nothing_is_lost_or_doubled(
    chat_model: Path, tmp_path: Path
) -> None:
    prompts = [list(range(3, 6 + i)) for i in range(24)]
    lines = [completion(f"r{i}", each, max_tokens=24) for i, each in enumerate(prompts)]
    requests, answers = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "jaxengine", "run-batch"]
    process = subprocess.Popen([*command, *arguments(chat_model, requests, answers)])
    try:
        deadline = time.monotonic() + 240
        while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "no answer has come"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    whole = answers.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    num_done = whole.count(b"\n")
    assert 3 <= num_done < 24, "it was to be killed in the middle"
    answers.write_bytes(whole + b'{"id": "batch_req_1", "custom_id": "r2')
    assert run(chat_model, requests, answers) == 0
    assert answers.read_bytes().startswith(whole), "what was whole stays as it was"
    found = read(answers)
    assert sorted(found) == sorted(f"r{i}" for i in range(24))
    for i in range(24):
        body = found[f"r{i}"]["response"]["body"]
        assert body["usage"]["prompt_tokens"] == len(prompts[i])


def test_two_lines_of_one_name_are_refused_by_it(tmp_path: Path, capsys: Any) -> None:
    lines = [completion("a"), completion("b"), completion("a")]
    requests, answers = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(tmp_path, requests, answers) == 2
    assert "custom_id 'a' is on lines 1 and 3" in capsys.readouterr().err
    assert not answers.exists()


def test_the_output_of_another_input_and_the_input_itself_are_refused(
    tmp_path: Path, capsys: Any
) -> None:
    requests = write(tmp_path / "in.jsonl", [completion("a")])
    other = {"id": "1", "custom_id": "z", "response": None, "error": {"message": "", "line": 1}}
    answers = write(tmp_path / "out.jsonl", [other])
    before = answers.read_bytes()
    assert run(tmp_path, requests, answers) == 2
    assert "line 1 answers 'z', which the input lacks" in capsys.readouterr().err
    assert answers.read_bytes() == before
    assert run(tmp_path, requests, requests) == 2
    assert "--output-file is the --input-file" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "none.jsonl", answers) == 2
    assert "none.jsonl': No such file" in capsys.readouterr().err


def test_an_output_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    first = BatchOutput(tmp_path / "out.jsonl", {"a"})
    with pytest.raises(ValueError, match="is being written by another process"):
        BatchOutput(tmp_path / "out.jsonl", {"a"})
    first.close()
    BatchOutput(tmp_path / "out.jsonl", {"a"}).close()


def test_a_full_disk_ends_the_run_and_says_so(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def no_room(self: BatchOutput, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BatchOutput, "write", no_room)
    requests = write(tmp_path / "in.jsonl", [completion("a"), completion("b")])
    assert run(chat_model, requests, tmp_path / "out.jsonl") == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"custom_id": 7}', "custom_id is 7"),
        (b'{"custom_id": "a", "method": "GET"}', "method is 'GET'"),
        (b'{"custom_id": "a", "method": "POST", "url": ["/v1"]}', "url is"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "body is None"),
    ],
)
def test_a_line_that_is_no_request_says_why(line: bytes, message: str) -> None:
    request = parse_request(4, line)
    assert message in request.problem
    assert "line 4" in request.problem
