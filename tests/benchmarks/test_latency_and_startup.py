"""What the latency and start-up benchmarks calculate from what they measure."""

import argparse

import pytest

from benchmarks.device_rates import best_rate, memory_rates
from benchmarks.latency import to_record
from benchmarks.startup import fastest
from benchmarks.startup import to_record as startup_record
from jaxengine.bench.offline import time_per_output_token
from jaxengine.outputs import RequestMetrics


def test_the_first_token_has_no_gap() -> None:
    metrics = RequestMetrics(
        10.0, first_token_time=11.0, last_token_time=13.0, num_generation_tokens=5
    )
    assert metrics.first_token_latency == 1.0
    assert time_per_output_token(metrics) == 0.5


def test_a_latency_record_is_in_milliseconds_and_counts_the_whole_batch() -> None:
    args = argparse.Namespace(
        model="some/model", stream=False, input_len=7, output_len=11, num_iters=2,
        tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1,
    )  # fmt: skip
    times = {"ttft": [0.1, 0.3], "tpot": [0.02, 0.04], "batch": [0.5, 0.5]}
    record = to_record("float32", 4, times, args)
    assert record["workload"] == "latency-4x(7,11)"
    assert record["model"] == "model"
    assert record["ttft_ms"]["median"] == pytest.approx(200)
    assert record["tpot_ms"]["median"] == pytest.approx(30)
    assert record["output_tok_s"] == 88  # 4 x 11 tokens in half a second


def test_a_startup_record_holds_the_best_start_of_each_kind() -> None:
    def start(seconds: float) -> dict:
        return {"seconds": seconds, "parts": {}, "num_cache_hits": 0, "programs": []}

    starts = {"cold": [start(9.0), start(8.0)], "warm": [start(3.0), start(4.0)]}
    best = {kind: fastest(records) for kind, records in starts.items()}
    args = argparse.Namespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    record = startup_record(best, starts, args)
    assert (record["seconds"], record["warm_seconds"]) == (8.0, 3.0)
    assert record["all"] == {"cold": [9.0, 8.0], "warm": [3.0, 4.0]}


def test_every_way_to_move_bytes_runs_and_the_best_counts() -> None:
    records = memory_rates(tiny=True)
    assert {(record["kind"], record["name"]) for record in records} >= {
        ("copy", "copy"),
        ("read", "product, 8 rows"),
    }
    assert best_rate(records, "copy") == max(r["gb_s"] for r in records if r["kind"] == "copy") > 0
