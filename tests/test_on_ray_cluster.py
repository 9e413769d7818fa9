"""A batch over a dataset and a service, on replicas of a tiny model in a local Ray cluster."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra: pip install 'jaxengine[ray]'")

import psutil
import ray
import ray.data
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxengine import LLM
from jaxengine.on_ray.batch import BatchReport, generate_dataset, main
from jaxengine.on_ray.serve import LLMDeployment, build_app
from tests.helpers import greedy

pytestmark = pytest.mark.xdist_group("ray")

ENGINE_ARGS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "num_gpu_blocks_override": 65,
    "disable_log_stats": True,
}
TEXTS = ["the quick brown fox", "once upon a time", "pages of keys", "a small engine"]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """A cluster of its own for this process, and nothing of it left at the end."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    started = psutil.Process().children(recursive=True)
    yield
    serve.shutdown()
    started += psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(set(started), timeout=30)
    assert [process.cmdline() for process in alive] == []


def wait_until(is_true: Callable[[], object], timeout_s: float = 600.0) -> None:
    """Wait for something that comes; the time is that of a machine with much else to do."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


# Batches.


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_results(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_run_does_what_is_missing_and_counts_bad_rows(
    tmp_path: Path, chat_model: Path, llm: LLM
) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    messages = [{"role": "user", "content": "the lazy dog"}]
    bad = [{"prompt": ""}, {"prompt": "fox " * 300}, {"text": "no prompt"}]
    save_rows(source, [*({"prompt": text} for text in TEXTS), {"messages": messages}, *bad])

    def run(max_tokens: int) -> BatchReport:
        params = greedy(max_tokens)
        model = str(chat_model)
        return generate_dataset(
            source, out, model, params, engine_args=ENGINE_ARGS, rows_per_shard=3, use_tqdm=False
        )

    assert run(6) == BatchReport(num_rows=8, num_errors=3, num_shards=3, num_shards_before=0)
    results = read_results(out)
    assert [row["row"] for row in results] == list(range(8))
    expected = llm.generate(TEXTS, greedy(6), use_tqdm=False)
    expected += llm.chat(messages, greedy(6), use_tqdm=False)
    assert [row["outputs"][0]["text"] for row in results[:5]] == [
        output.outputs[0].text for output in expected
    ]
    errors = [row["error"] for row in results[5:]]
    for error, part in zip(
        errors, ["the prompt is empty", "shorten the prompt", "or messages"], strict=True
    ):
        assert part in error

    (out / "part-000001.jsonl").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert run(6) == BatchReport(num_rows=8, num_errors=3, num_shards=3, num_shards_before=2)
    assert read_results(out) == results
    assert {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(ValueError, match=r"sampling_params\.max_tokens was 6 and is now 7"):
        run(7)


def replica_pids() -> set[int]:
    """Processes of this cluster that hold a replica of a batch."""
    pids = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                pids.add(process.pid)
    return pids


def test_no_row_is_lost_or_doubled_when_a_replica_is_killed(
    tmp_path: Path, chat_model: Path, llm: LLM
) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    prompts = [f"{TEXTS[i % 4]} {i}" for i in range(120)]
    save_rows(source, [{"prompt": prompt} for prompt in prompts])
    arguments = [str(chat_model), str(source), f"--output-dir={out}", "--rows-per-shard=4"]
    arguments += ["--max-tokens=100", "--temperature=0", "--ignore-eos", "--max-num-seqs=4"]
    arguments += ["--max-num-batched-tokens=16", "--num-gpu-blocks-override=65"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        status = pool.submit(main, [*arguments, "--disable-log-stats"])
        # The first of thirty parts: late as this thread may wake up, the replica is at work then.
        wait_until(lambda: status.done() or (out / "part-000000.jsonl").exists())
        (killed,) = replica_pids()
        os.kill(killed, signal.SIGKILL)
        assert len(list(out.glob("part-*"))) < 30  # it was at work
        pids: set[int] = set()
        wait_until(lambda: pids.update(replica_pids()) or status.done())
        assert status.result() == 0
    assert pids - {killed}  # another one has done the rest
    results = read_results(out)
    assert [row["row"] for row in results] == list(range(len(prompts)))
    expected = llm.generate(prompts, greedy(100), use_tqdm=False)
    assert [row["outputs"][0]["text"] for row in results] == [
        output.outputs[0].text for output in expected
    ]
    assert list(out.glob("*.tmp")) == []


# The service.


class BreakableDeployment(LLMDeployment):
    """A replica that says how it is, and whose device can be made to fail."""

    async def __call__(self, request: Request) -> Response:
        if request.url.path.endswith("/break"):
            self.llm.engine.runner.execute = _fail  # type: ignore[method-assign]
        elif not request.url.path.endswith("/stats"):
            return await super().__call__(request)
        return JSONResponse({**self.stats(), "process_id": os.getpid()})


def _fail(*step: Any) -> Any:
    raise RuntimeError("device lost")


class Service:
    """A client. It holds no handle of Serve's, whose threads would outlive the cluster."""

    def __init__(self, port: int) -> None:
        self.port = port

    def open(
        self, body: Any, *, path: str = "/", method: str = "POST"
    ) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        return connection

    def post(self, path: str = "/", **fields: Any) -> tuple[int, Any]:
        with contextlib.closing(self.open(fields, path=path)) as connection:
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def stats(self) -> dict[str, int]:
        return self.post("/stats")[1]

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.stats()["num_running"] == 0)


@pytest.fixture(scope="module")
def service(_cluster: None, chat_model: Path) -> Service:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = build_app(
        {"model": str(chat_model), "generation_config": "vllm", **ENGINE_ARGS},
        {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 50},
        num_cpus=0.5,
        deployment_class=BreakableDeployment,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=2,
    )
    serve.run(app)
    return Service(port)


LONG = {"prompt": "the fox", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def test_the_reply_is_that_of_generate(service: Service, llm: LLM) -> None:
    (expected,) = llm.generate([TEXTS[0]], greedy(6), use_tqdm=False)
    status, reply = service.post(prompt=TEXTS[0], max_tokens=6, temperature=0, ignore_eos=True)
    assert status == 200
    assert reply == {
        "num_prompt_tokens": len(expected.prompt_token_ids),
        "outputs": [
            {
                "index": 0,
                "text": expected.outputs[0].text,
                "token_ids": expected.outputs[0].token_ids,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
    }


def test_a_stream_brings_the_reply_piece_by_piece(service: Service, llm: LLM) -> None:
    messages = [{"role": "user", "content": "the lazy dog"}]
    (expected,) = llm.chat(messages, greedy(9), use_tqdm=False)
    fields = {"messages": messages, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    with contextlib.closing(service.open({**fields, "stream": True})) as connection:
        response = connection.getresponse()
        assert response.getheader("content-type", "").startswith("text/event-stream")
        events = response.read().decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    outputs = [json.loads(event.removeprefix("data: "))["outputs"][0] for event in events[:-1]]
    assert len(outputs) > 4
    assert "".join(output["text"] for output in outputs) == expected.outputs[0].text
    assert outputs[-1]["finish_reason"] == "length"


def test_concurrent_requests_share_the_batch(service: Service) -> None:
    before = service.stats()["num_steps"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: service.post(**LONG), range(4)))
    assert [status for status, _ in replies] == [200] * 4
    assert service.stats()["num_steps"] - before < 4 * 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        ({"max_tokens": 3}, "either a prompt or messages"),
        ({"prompt": "a", "best_of": 2}, "best_of: no such field"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "fox " * 300, "stream": True}, "shorten the prompt"),
    ],
)
def test_a_bad_request_is_a_400_with_the_engines_words(
    service: Service, body: Any, message: str
) -> None:
    with contextlib.closing(service.open(body)) as connection:
        response = connection.getresponse()
        assert response.status == 400
        assert message in json.loads(response.read())["error"]["message"]


def test_only_post_is_offered(service: Service) -> None:
    with contextlib.closing(service.open({}, method="GET")) as connection:
        assert connection.getresponse().status == 405


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_away_aborts_its_request(service: Service, is_stream: bool) -> None:
    service.wait_until_idle()
    before = service.stats()["num_steps"]
    # 60 requests of 200 tokens, 4 at a time, would be 3,000 steps.
    fields = {**LONG, "stream": is_stream}
    clients = [service.open(fields) for _ in range(60)]
    wait_until(lambda: service.stats()["num_running"] > 0)
    for client in clients:
        client.close()
    service.wait_until_idle()
    assert service.stats()["num_steps"] - before < 2900


def test_an_engine_that_fails_answers_500_and_is_replaced(service: Service) -> None:
    service.wait_until_idle()
    first_pid = service.stats()["process_id"]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        streaming = service.open({**LONG, "stream": True}).getresponse()
        replies = [pool.submit(service.post, **LONG) for _ in range(16)]
        wait_until(lambda: service.stats()["num_running"] > 0)
        service.post("/break")
        last_event = streaming.read().decode().split("\n\n")[-2]
        statuses = [reply.result()[0] for reply in replies]
        bodies = [reply.result()[1] for reply in replies if reply.result()[0] == 500]
    assert "device lost" in last_event or last_event == "data: [DONE]"  # it was ready before
    assert bodies
    assert set(statuses) <= {200, 500}
    assert all("device lost" in body["error"]["message"] for body in bodies)
    wait_until(lambda: service.post(prompt="the fox", max_tokens=2)[0] == 200)
    assert service.stats()["process_id"] != first_pid


def test_replicas_are_added_under_load(service: Service, chat_model: Path) -> None:
    load = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    app = build_app(
        {"model": str(chat_model), **ENGINE_ARGS},
        {**load, "upscale_delay_s": 0.1, "look_back_period_s": 0.5, "metrics_interval_s": 0.1},
        num_cpus=0.5,
        name="crowded",
        graceful_shutdown_timeout_s=2,
    )
    serve.run(app, name="crowded", route_prefix="/crowded")

    def num_running() -> int:
        deployments = serve.status().applications["crowded"].deployments
        return deployments["crowded"].replica_states.get("RUNNING", 0)

    assert num_running() == 1
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            service.post("/crowded", **LONG)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        try:
            for _ in range(8):
                pool.submit(ask)
            wait_until(lambda: num_running() == 2)
        finally:
            is_over.set()
