"""Tensor parallelism on 8 virtual devices: same tokens, each device its share, few reductions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxengine.sharding import check_tensor_parallel_size
from tests.helpers import hf_greedy, make_llm, save_tiny_chat_model
from tests.sharded_run import NUM_TOKENS, PROMPTS, SIZES

V, D, F, N, K, H, L = 160, 64, 96, 8, 2, 8, 2
MODEL = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "num_hidden_layers": L,
}
EVERY_SIZE = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("sharded"), **MODEL)


@pytest.fixture(scope="module")
def results(sharded_model: Path) -> dict[int, dict[str, Any]]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded_run", sharded_model],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {int(size): result for size, result in found.items()}


@EVERY_SIZE
def test_every_size_gives_the_tokens_of_transformers(
    results: dict, sharded_model: Path, size: int
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(sharded_model).float().eval()
    expected = [hf_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert results[size]["first"] == expected
    assert results[size]["second"] == expected[2:]


@EVERY_SIZE
def test_the_runs_met_preemption_and_cached_prefixes(results: dict, size: int) -> None:
    assert results[size]["num_preemptions"] > 0
    assert results[size]["num_cached_tokens"] == 32


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize(("step", "tokens", "rows"), [("mixed", 16, 2), ("decode", 2, 2)])
def test_a_step_reduces_twice_a_layer_and_once_for_the_embedding(
    results: dict, size: int, step: str, tokens: int, rows: int
) -> None:
    reductions = [f"all-reduce {tokens},{D}"] * (2 * L + 1)
    assert results[size]["collectives"][step] == [f"all-gather {rows},{V}", *reductions]


@EVERY_SIZE
def test_each_device_holds_its_share_of_the_weights(results: dict, size: int) -> None:
    kv_heads = max(K // size, 1)  # with more shards than KV heads each is held several times
    qkv, out = (N // size + 2 * kv_heads) * H * D, D * N // size * H
    layer = qkv + out + 3 * F * D // size + 2 * D
    expected = 4 * (2 * V * D // size + L * layer + D)
    assert results[size]["param_bytes"] == [expected] * size + [0] * (8 - size)


@EVERY_SIZE
def test_each_device_holds_its_heads_of_the_cache(results: dict, size: int) -> None:
    num_blocks, block_size = 5, 16
    expected = 4 * 2 * L * num_blocks * max(K // size, 1) * block_size * H
    assert results[size]["cache_bytes"] == [expected] * size + [0] * (8 - size)


def test_a_size_that_does_not_divide_names_the_ones_that_do() -> None:
    shape = {"num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    with pytest.raises(ValueError, match=r"tensor_parallel_size 3 .*\[1, 2, 4, 8, 16, 32\]"):
        check_tensor_parallel_size(3, **shape)
    check_tensor_parallel_size(16, **shape)  # each KV head on two devices
    with pytest.raises(ValueError, match=r"num_kv_heads 3,.*use one of \[1, 3\]"):
        check_tensor_parallel_size(
            2, num_heads=9, num_kv_heads=3, intermediate_size=1536, vocab_size=49149
        )


def test_more_shards_than_devices_are_refused(sharded_model: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size 64 needs 64 devices"):
        make_llm(sharded_model, tensor_parallel_size=64)
