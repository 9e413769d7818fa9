"""The least time of a workload: by hand for a small one, and against figures worked out before."""

import pytest

from benchmarks.floor import RATES, Rates, floor_s, rates_of
from benchmarks.records import ROOT, read_model
from benchmarks.workloads import WORKLOADS
from jaxengine.model_config import ModelConfig


def model(name: str) -> ModelConfig:
    return read_model(ROOT / "benchmarks/models" / name)


@pytest.mark.parametrize(
    ("name", "workload", "seconds"),
    [
        ("llama-3.1-8b", "single", 1.31),
        ("llama-3.1-8b", "decode-heavy", 5.40),
        ("llama-3.1-8b", "prefill-heavy", 4.97),
        ("llama-3.1-8b", "long-context", 7.38),
        ("qwen3-0.6b", "batch-8", 0.12),
        ("qwen3-0.6b", "prefill-heavy", 0.52),
    ],
)
def test_the_floor_on_an_h100(name: str, workload: str, seconds: float) -> None:
    found = floor_s(WORKLOADS[workload], model(name), RATES["H100"])
    assert found == pytest.approx(seconds, rel=0.02, abs=0.005)


def test_a_step_takes_the_longer_of_bytes_and_arithmetic() -> None:
    tiny = model("tiny-llama")
    free = 1e30
    one_token = [(1, 1)] * 3  # no step behind the prompts
    assert floor_s(one_token, tiny, Rates(1.0, free)) == pytest.approx(0, abs=1e-9)
    by_bytes = floor_s([(1, 2)], tiny, Rates(1.0, free))
    kv_bytes = 2 * tiny.num_layers * 2 * tiny.num_kv_heads * tiny.head_dim
    more_keys = floor_s([(11, 2)], tiny, Rates(1.0, free))
    assert more_keys - by_bytes == pytest.approx(10 * kv_bytes)
    prefill = floor_s([(1, 1)], tiny, Rates(free, 1.0))
    by_flops = floor_s([(1, 2)], tiny, Rates(free, 1.0)) - prefill
    assert by_flops == pytest.approx(prefill, rel=0.01)  # the same products, one key more


def test_the_device_is_known_by_its_name() -> None:
    assert rates_of("NVIDIA H100 80GB HBM3") == RATES["H100"]
    assert rates_of("cpu") is None
