"""One engine over several processes: the tokens of one process, and a named error for each loss."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from jaxengine.config import EngineConfig
from jaxengine.distributed.roll_call import KEY_VARIABLE, HostsError
from jaxengine.engine.replicas import order_by_replica
from tests.distributed.leader_run import NUM_TOKENS, PROMPTS, SIZES, generate
from tests.distributed.ports import free_ports
from tests.helpers import make_llm, save_tiny_chat_model

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 300  # of a start on a machine that is busy with other tests
pytestmark = pytest.mark.xdist_group("hosts")  # one engine after the other


class Hosts:
    """Starts the processes of an engine, each with virtual CPU devices, and ends them."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.port = free_ports()
        self._processes: list[subprocess.Popen] = []

    def start_leader(self, scenario: str, num_devices: int = 1, **arguments: Any) -> Any:
        given = {"nnodes": 2, "master_port": self.port, **arguments}
        module = ["tests.distributed.leader_run", str(self.model), json.dumps(given), scenario]
        return self._start("leader", num_devices, module)

    def start_worker(self, rank: int = 1, num_devices: int = 1, **arguments: Any) -> Any:
        given = {
            **{"nnodes": 2, "node_rank": rank, "master_port": self.port, **SIZES},
            **arguments,
        }
        flags = [f"--{name}={value}" for name, value in given.items()]
        module = ["jaxengine.cli.main", "worker", str(self.model), "--disable-log-stats", *flags]
        return self._start(f"worker{rank}", num_devices, module)

    def _start(self, name: str, num_devices: int, module: list[str]) -> subprocess.Popen:
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", KEY_VARIABLE: "k" * 32}
        with (
            (self.directory / f"{name}.out").open("w") as out,
            (self.directory / f"{name}.err").open("w") as err,
        ):
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env={**os.environ, **settings, "RAY_ADDRESS": "local"},
                cwd=ROOT,
                stdout=out,
                stderr=err,
            )
        self._processes.append(process)
        return process

    def output(self, name: str = "leader") -> list[dict[str, Any]]:
        """The JSON lines that a process has printed so far."""
        lines = (self.directory / f"{name}.out").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def errors(self, name: str) -> str:
        return (self.directory / f"{name}.err").read_text()

    def wait_for_output(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self.output():
            assert time.monotonic() < deadline, self.errors("leader")[-3000:]
            assert all(process.poll() is None for process in self._processes), self.errors("leader")
            time.sleep(0.1)

    def kill_all(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def hosts(tmp_path: Path, hosts_model: Path) -> Iterator[Hosts]:
    started = Hosts(tmp_path, hosts_model)
    yield started
    started.kill_all()


@pytest.fixture(scope="module")
def hosts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2}
    return save_tiny_chat_model(tmp_path_factory.mktemp("hosts_model"), **sizes)


@pytest.fixture(scope="module")
def expected(hosts_model: Path) -> dict[str, Any]:
    """What one process generates."""
    found = generate(make_llm(hosts_model, **SIZES))
    assert found["num_preemptions"] > 0
    assert found["num_cached_tokens"] == 32
    assert len(found["greedy"]) == len(PROMPTS)
    assert len(found["sampled"][0]) == NUM_TOKENS
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("num_devices", "sizes"),
    [
        (1, {"tensor_parallel_size": 2}),
        (2, {"tensor_parallel_size": 4}),
        (1, {"pipeline_parallel_size": 2}),
        pytest.param(
            2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_generate_what_one_does(
    hosts: Hosts, expected: dict[str, Any], num_devices: int, sizes: dict[str, int]
) -> None:
    worker = hosts.start_worker(num_devices=num_devices, **sizes)
    leader = hosts.start_leader("tokens", num_devices, **sizes)
    assert leader.wait(TIMEOUT_S) == 0, hosts.errors("leader")[-3000:]
    assert worker.wait(30) == 0, hosts.errors("worker1")[-3000:]
    assert hosts.output() == [expected]


def test_replicas_that_span_both_processes_generate_the_same(
    hosts: Hosts, expected: dict[str, Any]
) -> None:
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    hosts.start_worker(num_devices=2, **sizes)
    leader = hosts.start_leader("tokens", 2, **sizes)
    assert leader.wait(TIMEOUT_S) == 0, hosts.errors("leader")[-3000:]
    (found,) = hosts.output()
    for name in ("greedy", "greedy_again", "sampled", "logprobs", "prompt_logprobs"):
        assert found[name] == expected[name]


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    process_index: int
    number: int


def test_every_replica_has_a_share_of_each_host() -> None:
    config = EngineConfig(
        "a model", nnodes=2, pipeline_parallel_size=2, tensor_parallel_size=2, data_parallel_size=2
    )
    devices: Any = [FakeDevice(number // 4, number) for number in range(8)]
    found = order_by_replica(config, devices)
    assert [device.number for device in found] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_replicas_that_do_not_divide_a_host_are_refused() -> None:
    config = EngineConfig("a model", nnodes=2, tensor_parallel_size=2, data_parallel_size=3)
    devices: Any = [FakeDevice(number // 4, number) for number in range(8)]
    with pytest.raises(ValueError, match="data_parallel_size 3 does not divide the 4 devices"):
        order_by_replica(config, devices)


def test_a_lost_worker_ends_the_engine_with_its_name_and_the_requests(hosts: Hosts) -> None:
    worker = hosts.start_worker(tensor_parallel_size=2)
    leader = hosts.start_leader("endless", tensor_parallel_size=2)
    hosts.wait_for_output()
    worker.send_signal(signal.SIGKILL)
    killed = time.time()
    assert leader.wait(30) == 0
    assert time.time() - killed < 20
    _, found = hosts.output()
    assert (
        f"node 1 ({os.uname().nodename} 127.0.0.1, process {worker.pid}) is lost"
        in (found["error"])
    )
    assert found["request_ids"]
    assert f"not finished: {', '.join(found['request_ids'])}" in found["error"]
    assert found["time"] - killed < 10


def test_a_lost_leader_ends_the_worker(hosts: Hosts) -> None:
    worker = hosts.start_worker(tensor_parallel_size=2)
    leader = hosts.start_leader("endless", tensor_parallel_size=2)
    hosts.wait_for_output()
    leader.send_signal(signal.SIGKILL)
    assert worker.wait(10) != 0
    assert "the leader is lost" in hosts.errors("worker1") or (
        "the JAX distributed service detected fatal errors" in hosts.errors("worker1")
    )


def test_a_worker_with_other_flags_is_refused(hosts: Hosts) -> None:
    worker = hosts.start_worker(tensor_parallel_size=2, block_size=32)
    leader = hosts.start_leader("tokens", tensor_parallel_size=2)
    assert worker.wait(TIMEOUT_S) == 2
    assert leader.wait(TIMEOUT_S) == 1
    difference = "block_size is 16 on the leader and 32 there"
    assert difference in hosts.errors("worker1")
    assert difference in hosts.errors("leader")


def test_a_worker_that_cannot_load_its_part_says_so_on_the_leader(
    hosts: Hosts, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in hosts.model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = safetensors.numpy.load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file(weights, broken / "model.safetensors")
    leader = hosts.start_leader("tokens", tensor_parallel_size=2)
    hosts.model = broken
    worker = hosts.start_worker(tensor_parallel_size=2)
    assert worker.wait(TIMEOUT_S) == 2
    assert leader.wait(TIMEOUT_S) == 1
    for name in ("worker1", "leader"):
        assert "model.layers.1.mlp.up_proj.weight" in hosts.errors(name)
    assert "node 1" in hosts.errors("leader")


def test_a_worker_that_never_comes_is_named(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    several = {"nnodes": 2, "tensor_parallel_size": 2, "master_port": hosts.port}
    with pytest.raises(HostsError, match="node 1 of 2 did not come to"):
        make_llm(hosts.model, distributed_timeout_seconds=1, **several)


def test_an_llm_of_another_rank_is_refused(hosts: Hosts) -> None:
    with pytest.raises(ValueError, match="Start the others with 'jaxengine worker'"):
        make_llm(hosts.model, nnodes=2, node_rank=1)


def test_a_worker_of_rank_0_is_refused(hosts: Hosts) -> None:
    worker = hosts.start_worker(0)
    assert worker.wait(TIMEOUT_S) == 2
    assert "node_rank is 0 of nnodes 2" in hosts.errors("worker0")


def test_ray_starts_the_worker(hosts: Hosts, expected: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="needs the extra: pip install 'jaxengine[ray]'")
    leader = hosts.start_leader(
        "tokens", tensor_parallel_size=2, distributed_executor_backend="ray"
    )
    assert leader.wait(TIMEOUT_S) == 0, hosts.errors("leader")[-3000:]
    assert hosts.output() == [expected]
