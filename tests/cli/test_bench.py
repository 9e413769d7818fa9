"""jaxengine bench: what is calculated, and whole runs on a tiny model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine.bench.serving import Timing, summarise
from jaxengine.bench.workload import RandomWorkload, arrival_times
from jaxengine.cli import main as cli


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[str]:
    """Our server, on an engine whose steps take 10 ms."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.server.fake_server", str(chat_model)]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--api-key", "secret"]
    environment = {**os.environ, "FAKE_STEP_S": "0.01"}
    process = subprocess.Popen([*command, *flags], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, "the server has ended at its start"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def bench_serve(url: str, *flags: str) -> int:
    sizes = ("--num-prompts", "6", "--input-len", "5", "--output-len", "8")
    key = ("--api-key", "secret", "--disable-tqdm")
    return cli.main(["bench", "serve", "--base-url", url, *key, *sizes, *flags])


def test_serve_measures_every_request_of_a_server(server: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.json"
    flags = ("--max-concurrency", "2", "--output-json", str(file), "--goodput", "ttft:0.001")
    assert bench_serve(server, *flags) == 0
    record = json.loads(file.read_text())
    assert (record["completed"], record["failed"]) == (6, 0)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (6 * 5, 6 * 8)
    assert record["request_goodput"] == 0
    assert record["output_throughput"] == pytest.approx(48 / record["duration"], rel=1e-3)
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < record[f"median_{name}_ms"] <= record[f"p99_{name}_ms"]
    assert record["mean_tpot_ms"] > 4, "two steps of 10 ms run at a time"
    assert record["duration"] > 3 * 8 * 0.004, "two at a time, in three turns"
    out = capsys.readouterr().out
    assert "Mean TTFT (ms)" in out
    assert "P99 E2EL (ms)" in out


def test_serve_measures_chats_at_a_rate(server: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    flags = ("--endpoint", "/v1/chat/completions", "--request-rate", "20")
    percentiles = ("--metric-percentiles", "50,90")
    assert bench_serve(server, *flags, *percentiles, "--output-json", str(file)) == 0
    record = json.loads(file.read_text())
    assert (record["completed"], record["total_output_tokens"]) == (6, 48)
    assert record["duration"] > arrival_times(6, 20)[-1]
    assert "p90_ttft_ms" in record
    assert "p99_ttft_ms" not in record


def test_serve_says_why_the_first_request_fails(server: str, capsys: Any) -> None:
    assert bench_serve(server, "--extra-body", '{"top_p": 7}') == 2
    err = capsys.readouterr().err
    assert "the first request has failed" in err
    assert "answered 400" in err
    assert bench_serve(server, "--extra-body", '{"top_p": 7}', "--num-warmups", "0") == 1
    assert "failed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--request-rate", "0"], "--request-rate is 0.0"),
        (["--input-len", "0"], "--input-len is 0"),
        (["--random-range-ratio", "1"], "--random-range-ratio is 1.0"),
        (["--max-concurrency", "0"], "--max-concurrency is 0"),
        (["--goodput", "itl:3"], "must be ttft, tpot or e2el"),
    ],
)
def test_serve_refuses_what_is_not_possible(capsys: Any, flags: list[str], message: str) -> None:
    assert cli.main(["bench", "serve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_numbers_are_those_of_the_requests_that_succeeded() -> None:
    good = Timing(num_input=10, num_output=5, ttft=0.1, itl=[0.1] * 4, e2el=0.5)
    one_token = Timing(num_input=10, num_output=1, ttft=0.3, e2el=0.3)
    record = summarise([good, one_token, Timing(problem="no")], 2.0, goodput={"ttft": 200.0})
    assert (record["completed"], record["failed"]) == (2, 1)
    assert record["request_throughput"] == 1.0
    assert record["output_throughput"] == 3.0
    assert record["total_token_throughput"] == 13.0
    assert record["request_goodput"] == 0.5
    assert record["mean_ttft_ms"] == pytest.approx(200)
    assert record["median_tpot_ms"] == pytest.approx(100), "one token has no time per token"
    assert record["p99_itl_ms"] == pytest.approx(100)


def test_a_workload_is_as_long_as_asked_and_always_the_same() -> None:
    workload = RandomWorkload(50, 20, 10, range_ratio=0.5, prefix_len=4, seed=3)
    drawn = workload.draw(range(100, 200))
    assert drawn == workload.draw(range(100, 200))
    assert {tuple(prompt[:4]) for prompt, _ in drawn} == {tuple(drawn[0][0][:4])}
    lengths = [len(prompt) - 4 for prompt, _ in drawn]
    assert (min(lengths) >= 10, max(lengths) <= 30, len(set(lengths)) > 5) == (True, True, True)
    assert all(5 <= output <= 15 for _, output in drawn)
    assert all(100 <= token < 200 for prompt, _ in drawn for token in prompt)


def test_arrivals_keep_their_rate_and_bursts_are_bursts() -> None:
    assert arrival_times(3, float("inf")) == [0, 0, 0]
    times = np.array(arrival_times(4000, 10.0))
    assert times[0] == 0
    assert times[-1] == pytest.approx(400, rel=0.1)
    bursts = np.diff(arrival_times(4000, 10.0, burstiness=0.2))
    assert bursts.std() > 1.5 * np.diff(times).std()


TINY = (
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--num-gpu-blocks-override", "65"),
    *("--disable-tqdm", "--load-format", "dummy"),
)


def test_latency_times_batches(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.json"
    sizes = ("--batch-size", "3", "--input-len", "5", "--output-len", "4")
    iterations = ("--num-iters", "2", "--num-iters-warmup", "1", "--output-json", str(file))
    model = ("--model", str(chat_model), "--disable-detokenize")
    assert cli.main(["bench", "latency", *model, *sizes, *iterations, *TINY]) == 0
    record = json.loads(file.read_text())
    assert len(record["latencies"]) == 2
    assert record["avg_latency"] == pytest.approx(np.mean(record["latencies"]))
    assert 0 < record["mean_ttft_ms"] < record["mean_batch_ms"]
    assert 0 < record["mean_tpot_ms"] < record["mean_batch_ms"]
    assert record["p10_batch_ms"] <= record["p99_batch_ms"]
    assert "Avg latency (s)" in capsys.readouterr().out


def test_throughput_counts_all_tokens(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.json"
    sizes = ("--num-prompts", "7", "--random-input-len", "9", "--random-output-len", "5")
    model = ("--model", str(chat_model), "--output-json", str(file))
    assert cli.main(["bench", "throughput", *model, *sizes, *TINY]) == 0
    record = json.loads(file.read_text())
    assert record["num_requests"] == 7
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (63, 35)
    assert record["tokens_per_second"] == pytest.approx(98 / record["elapsed_time"])
    assert record["requests_per_second"] == pytest.approx(7 / record["elapsed_time"])
    assert "Output token throughput" in capsys.readouterr().out


def test_a_warm_start_finds_the_programs_of_the_cold_one(
    chat_model: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "out.json"
    model = ("--model", str(chat_model), "--output-json", str(file))
    assert cli.main(["bench", "startup", *model, *TINY]) == 0
    starts = json.loads(file.read_text())["starts"]
    (cold,), (warm,) = starts["cold"], starts["warm"]
    assert cold["num_cache_hits"] < warm["num_cache_hits"]
    for start in (cold, warm):
        assert sum(start["parts"].values()) == pytest.approx(start["seconds"], abs=0.01)
    assert "Start, warm (best of 1)" in capsys.readouterr().out


def test_what_cannot_start_says_why(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["bench", "startup", "--model", str(tmp_path), "--disable-tqdm"]) == 2
    assert "the engine cannot start: " in capsys.readouterr().err
