"""Tensor and pipeline parallelism on 8 virtual devices: same tokens, each device its share."""

from pathlib import Path
from typing import Any

import pytest

from jaxengine.sharding import check_tensor_parallel_size, split_layers
from tests.helpers import hf_greedy, make_llm, run_on_virtual_devices, save_tiny_chat_model
from tests.sharded_run import MESHES, NUM_TOKENS, PROMPTS, REPLICAS, name_of

V, D, F, N, K, H, L = 160, 64, 96, 8, 2, 8, 5
MODEL = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "num_hidden_layers": L,
}
EVERY_MESH = pytest.mark.parametrize(("size", "num_stages"), MESHES, ids=map(name_of, MESHES))


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("sharded"), **MODEL)


@pytest.fixture(scope="module")
def results(sharded_model: Path) -> dict[str, dict[str, Any]]:
    return run_on_virtual_devices("tests.sharded_run", sharded_model)


@pytest.fixture(scope="module")
def expected_tokens(sharded_model: Path) -> list[list[int]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(sharded_model).float().eval()
    return [hf_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("name", [*map(name_of, MESHES), REPLICAS])
def test_every_mesh_gives_the_tokens_of_transformers(
    results: dict, expected_tokens: list[list[int]], name: str
) -> None:
    assert results[name]["first"] == expected_tokens
    assert results[name]["second"] == expected_tokens[2:]


@EVERY_MESH
def test_the_runs_met_preemption_and_cached_prefixes(
    results: dict, size: int, num_stages: int
) -> None:
    result = results[name_of((size, num_stages))]
    assert result["num_preemptions"] > 0
    assert result["num_cached_tokens"] == 32


@pytest.mark.parametrize("name", ["tp1 pp2", "tp2 pp2"])
def test_sampling_and_logprobs_do_not_depend_on_the_mesh(results: dict, name: str) -> None:
    for found, expected in zip(results[name]["mixed"], expected_of(results), strict=True):
        assert found["token_ids"] == expected["token_ids"]
        for kind in ("logprobs", "prompt_logprobs"):
            assert flatten(found[kind]) == pytest.approx(flatten(expected[kind]), abs=1e-4)
    assert sum(len(flatten(each["logprobs"])) for each in expected_of(results)) > 100
    assert sum(len(flatten(each["prompt_logprobs"])) for each in expected_of(results)) > 100


def expected_of(results: dict) -> list[dict[str, Any]]:
    return results["tp1 pp1"]["mixed"]


def flatten(nested: Any) -> list[float]:
    return [x for each in nested for x in flatten(each)] if isinstance(nested, list) else [nested]


@EVERY_MESH
@pytest.mark.parametrize(("step", "tokens", "rows"), [("mixed", 16, 2), ("decode", 2, 2)])
def test_a_step_reduces_twice_a_layer_and_once_for_the_embedding(
    results: dict, size: int, num_stages: int, step: str, tokens: int, rows: int
) -> None:
    stages = results[name_of((size, num_stages))]["collectives"][step]
    for found, layers in zip(stages, split_layers(L, num_stages), strict=True):
        is_first, is_last = layers.start == 0, layers.stop == L
        # The last layer's sums are of the rows' last tokens alone.
        reductions = [f"all-reduce {tokens},{D}"] * (2 * (len(layers) - is_last) + is_first)
        last_reductions = [f"all-reduce {rows},{D}"] * (2 * is_last)
        # The most likely token of each shard's part of the vocabulary, and its logit.
        gathers = [f"all-gather {size},{rows},2"] * (is_last and size > 1)
        assert found == sorted([*gathers, *reductions, *last_reductions])


@EVERY_MESH
def test_each_device_holds_its_share_of_the_weights(
    results: dict, size: int, num_stages: int
) -> None:
    kv_heads = max(K // size, 1)  # with more shards than KV heads each is held several times
    qkv, out = (N // size + 2 * kv_heads) * H * D, D * N // size * H
    layer = qkv + out + 3 * F * D // size + 2 * D
    numbers = [len(layers) * layer for layers in split_layers(L, num_stages)]
    numbers[0] += V * D // size
    numbers[-1] += V * D // size + D
    assert results[name_of((size, num_stages))]["param_bytes"] == by_device(numbers, size)


@EVERY_MESH
def test_each_device_holds_its_heads_and_layers_of_the_cache(
    results: dict, size: int, num_stages: int
) -> None:
    num_blocks, block_size = 5, 16
    heads = max(K // size, 1)
    numbers = [
        2 * len(layers) * num_blocks * heads * block_size * H
        for layers in split_layers(L, num_stages)
    ]
    assert results[name_of((size, num_stages))]["cache_bytes"] == by_device(numbers, size)


def by_device(numbers_of_stages: list[int], size: int) -> list[int]:
    """Bytes that each of the 8 devices should hold, of float32."""
    held = [4 * count for count in numbers_of_stages for _ in range(size)]
    return held + [0] * (8 - len(held))


def test_the_layers_are_cut_evenly_and_the_last_stages_are_the_shorter() -> None:
    assert split_layers(32, 1) == [range(32)]
    assert split_layers(32, 2) == [range(16), range(16, 32)]
    assert [len(layers) for layers in split_layers(30, 4)] == [8, 8, 7, 7]
    assert [layer for layers in split_layers(61, 7) for layer in layers] == list(range(61))
    with pytest.raises(ValueError, match="pipeline_parallel_size 3 is more than the model's 2 lay"):
        split_layers(2, 3)


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
    with pytest.raises(ValueError, match=r"tensor_parallel_size 64 x .* needs 64 devices"):
        make_llm(sharded_model, tensor_parallel_size=64)
