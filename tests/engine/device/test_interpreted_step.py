"""A whole step through the kernels that a GPU runs, in Pallas' interpreter, equals XLA's step.

The kernels have tests of their own; this one holds how a model puts them together.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.target import Target

from jaxengine.batch import StepShape
from jaxengine.engine.device.batch_builder import packed_views
from jaxengine.engine.device.step import (
    ForwardOutputs,
    StageParts,
    StepArguments,
    StepState,
    make_forward,
)
from jaxengine.model_config import ModelConfig
from jaxengine.models.options import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.sharding import make_mesh
from jaxengine.weights import param_specs

NUM_LAYERS, BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS, WIDTH = 3, 8, 40, 8, 8
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
# Query tokens and KV length of each row: decode rows first.
DECODING = [(1, 1), (1, 13), (1, 50), (1, 64)]
MIXED = [(1, 9), (1, 64), (9, 9), (4, 20)]
GEMMA2 = {"head_dim": 32, "sliding_window": 20, "query_pre_attn_scalar": 32}
GPT2 = {"n_embd": 128, "n_head": 4, "n_layer": NUM_LAYERS, "n_positions": 512, "n_inner": 256}
FALCON_RW = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
DECI = {"num_key_value_heads_per_layer": [2, 1, 4]}
UNGATED = {"GPT2LMHeadModel", "PhiForCausalLM", "FalconForCausalLM"}
KERNELS = {"split_product", "rope_kv_write", "paged_decode", "gated_few_rows", "residual_norm"}


@pytest.fixture
def started_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of the kernels that were traced; all of them are interpreted."""
    names: set[str] = set()
    call = pl.pallas_call

    def interpreted(*args: Any, **kwargs: Any) -> Any:
        names.add(kwargs["name"])
        return call(*args, **{**kwargs, "interpret": True})

    monkeypatch.setattr(pl, "pallas_call", interpreted)
    monkeypatch.setattr(plt, "debug_barrier", lambda: None)  # there are no threads
    yield names
    jax.clear_caches()  # nobody else is to find what was traced here


def run_step(
    architecture: str, rows: list[tuple[int, int]], extra: dict[str, Any], target: Target
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of the rows and all caches after a step on random weights and caches."""
    jax.clear_caches()
    hf_config = {**SIZES, **extra, "architectures": [architecture]}
    config = ModelConfig.from_hf(hf_config, "bfloat16")
    options = ModelOptions(max_model_len=512, target=target)
    factory = ModelRegistry.resolve(config.architecture)
    definition, specs = param_specs(lambda: factory(config, options))
    mesh = make_mesh(jax.devices()[:1])
    is_decoding = all(query_len == 1 for query_len, _ in rows)
    num_tokens = 8 if is_decoding else 32
    shape = StepShape(num_tokens, 8, decode_only=is_decoding)
    forward = make_forward(
        shape, parts=StageParts(definition, specs, mesh, range(NUM_LAYERS)), block_size=BLOCK_SIZE
    )
    rng = np.random.default_rng(0)

    def random(dims: tuple[int, ...], scale: float) -> jax.Array:
        return jnp.asarray(rng.standard_normal(dims) * scale, jnp.bfloat16)

    weights = tuple(random(spec.shape, 0.15) for spec in specs.values())
    caches = []
    for layer in config.spec.layers:
        assert layer.attention is not None
        heads, width = layer.attention.num_kv_heads, layer.attention.head_dim
        shape_of_cache = (NUM_BLOCKS, heads, BLOCK_SIZE, width)
        caches.append((random(shape_of_cache, 1.0), random(shape_of_cache, 1.0)))
    tables = np.zeros((NUM_SLOTS + 1, WIDTH), np.int32)
    tables[: len(rows)] = 1 + rng.permutation(NUM_BLOCKS - 1)[: len(rows) * WIDTH].reshape(
        -1, WIDTH
    )
    packed = np.zeros(shape.packed_size, np.int32)
    parts = packed_views(shape, packed)
    total = sum(query_len for query_len, _ in rows)
    parts["token_ids"][:total] = rng.integers(0, config.vocab_size, total)
    parts["slots"][:] = NUM_SLOTS
    parts["slots"][: len(rows)] = np.arange(len(rows))
    parts["query_lens"][: len(rows)] = [query_len for query_len, _ in rows]
    parts["seq_lens"][: len(rows)] = [seq_len for _, seq_len in rows]
    parts["table_rows"][:] = NUM_SLOTS + 1  # past the end: nothing to store
    parts["num_decode_rows"][0] = sum(query_len == 1 for query_len, _ in rows)
    with jax.set_mesh(mesh):
        state = StepState(caches, jnp.asarray(tables), jnp.zeros(NUM_SLOTS, jnp.int32))
        state, outputs = forward(weights, tuple(state), tuple(StepArguments(packed)), None)
    caches, logits = StepState(*state).caches, ForwardOutputs(*outputs).logits
    written = [np.asarray(cache, np.float32)[1:] for pair in caches for cache in pair]
    return np.asarray(logits, np.float32)[: len(rows)], written


@pytest.mark.parametrize(
    ("architecture", "extra", "rows"),
    [
        ("LlamaForCausalLM", {}, DECODING),
        ("LlamaForCausalLM", {}, MIXED),
        ("LlamaForCausalLM", {"attention_bias": True}, DECODING),
        ("Qwen3ForCausalLM", {"head_dim": 32}, DECODING),
        ("GPT2LMHeadModel", GPT2, DECODING),
        ("PhiForCausalLM", {}, DECODING),
        ("PhiForCausalLM", {}, MIXED),
        ("GemmaForCausalLM", {}, DECODING),
        ("Gemma2ForCausalLM", GEMMA2, MIXED),
        ("Gemma3ForCausalLM", {**GEMMA2, "sliding_window_pattern": 2}, DECODING),
        ("FalconForCausalLM", {}, DECODING),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, DECODING),
        ("FalconForCausalLM", FALCON_RW, DECODING),
        ("DeciLMForCausalLM", DECI, DECODING),
    ],
)
def test_a_step_of_few_rows_equals_xlas(
    architecture: str,
    extra: dict[str, Any],
    rows: list[tuple[int, int]],
    started_kernels: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, expected_caches = run_step(architecture, rows, extra, Target("cpu"))
    assert not started_kernels
    found, caches = run_step(architecture, rows, extra, Target("gpu", "hopper"))
    is_ragged = rows is MIXED
    expected_kernels = KERNELS | ({"ragged_attention_triton"} if is_ragged else set())
    if architecture in UNGATED:
        expected_kernels = expected_kernels - {"gated_few_rows"} | {"activated_few_rows"}
    assert started_kernels == expected_kernels
    # bfloat16 through three layers: rounding moves a logit by a few of its units.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9995
    for ours, theirs in zip(caches, expected_caches, strict=True):
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
