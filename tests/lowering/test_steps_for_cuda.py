"""Whole steps lower for CUDA, with every backend of attention, in both versions of jax.

It imports the engine and neither torch nor a checkpoint: jax 0.11, which Mosaic's newer kernels
need, is tested where there is no torch.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from jaxengine.pallas_kernels.gated_product_reference import gated_product_reference
from jaxengine.pallas_kernels.peers import inbox_layout
from jaxengine.pallas_kernels.target import Target

from jaxengine.batch import StepShape
from jaxengine.engine.device.kv_cache import KVCacheSpec, kv_heads
from jaxengine.engine.device.step import StageParts, StepArguments, StepState, make_forward
from jaxengine.model_config import ModelConfig
from jaxengine.models.options import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.sharding import TENSOR_AXIS, replicated
from jaxengine.weights import param_specs
from tests.kernels.h100 import h100s, lower_for_cuda

DECODE = StepShape(4, 4, decode_only=True)
MIXED = StepShape(16, 4, decode_only=False)
MOSAIC_KERNELS = ("gated_product_mosaic", "ragged_attention_mosaic")

# The models of the benchmarks, few layers and a small vocabulary: what lowering depends on.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SMOLLM = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
MODELS = {"llama-8b": LLAMA_8B, "qwen3-0.6b": QWEN3_06B, "smollm2": SMOLLM}
# For several GPUs only.
LLAMA_13B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
H100 = Target("gpu", "hopper", 132)
HAS_NEW_MOSAIC = hasattr(plgpu, "InterpretGPUParams")
LARGE_MODELS = {"llama-13b": LLAMA_13B, "llama-70b": LLAMA_70B}


def lower_step_for_cuda(name: str, backend: str | None, shape: StepShape, num_gpus: int = 1) -> str:
    sizes = {"vocab_size": 512, "num_hidden_layers": 3, "max_position_embeddings": 8192}
    config = ModelConfig.from_hf({**sizes, **(MODELS | LARGE_MODELS)[name]}, "bfloat16")
    options = ModelOptions(
        max_model_len=8192, target=H100, num_shards=num_gpus, attention_backend=backend
    )
    factory = ModelRegistry.resolve(config.architecture)
    definition, specs = param_specs(lambda: factory(config, options))
    mesh = h100s(num_gpus, TENSOR_AXIS)
    parts = StageParts(definition, specs, mesh, range(3))
    layout = None if num_gpus == 1 else inbox_layout(num_gpus, 16384 * config.hidden_size, H100)
    forward = make_forward(shape, parts=parts, block_size=16, inbox_layout=layout)
    cache_spec = KVCacheSpec(kv_heads(config, range(3), 1), 16, "bfloat16")

    def ints(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.int32, sharding=replicated(mesh))

    addresses = None if layout is None else ints(num_gpus, 2)
    arguments = (
        tuple(spec.abstract(mesh) for spec in specs.values()),
        tuple(StepState(cache_spec.abstract(1000, mesh), ints(257, 512), ints(256))),
        tuple(StepArguments(ints(shape.packed_size), None, addresses)),
        None,
    )
    return lower_for_cuda(forward, *arguments, mesh=mesh)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["triton", "mosaic", "xla"])
@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        (StepShape(64, 64, decode_only=True), [64]),
        (StepShape(64, 64, decode_only=False), [64]),
        (StepShape(512, 32, decode_only=False), [512, 32]),
    ],
    ids=["decode", "few tokens a row", "mixed"],
)
def test_the_step_lowers_for_cuda(
    name: str, backend: str, shape: StepShape, kinds: list[int]
) -> None:
    if backend == "mosaic" and not shape.decode_only and not HAS_NEW_MOSAIC:
        with pytest.raises(NotImplementedError, match="is too old"):
            lower_step_for_cuda(name, backend, shape)
        return
    text = lower_step_for_cuda(name, backend, shape)
    kernel = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu", "xla": "stablehlo.while"}
    served_by = "triton" if backend == "mosaic" and shape.decode_only else backend
    assert kernel[served_by] in text
    # Layers of a kind call one function: the kernel is in the text, and compiled, once.
    assert len(re.findall(r"func.func private @_run_layer\w*\(", text)) == len(kinds)
    assert len(re.findall(r"call @_run_layer\w*\(", text)) == 3
    hidden_size = MODELS[name]["hidden_size"]
    for num_outputs in kinds:
        layer = (
            rf"func.func private @_run_layer\w*\(.*-> \(tensor<{num_outputs}x{hidden_size}xbf16>"
        )
        assert len(re.findall(layer, text)) == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [MIXED, DECODE], ids=["mixed", "decode"])
def test_what_a_gpu_chooses_lowers_for_cuda_and_is_a_kernel_of_ours(
    name: str, shape: StepShape
) -> None:
    text = lower_step_for_cuda(name, None, shape)
    assert "mosaic_gpu" in text or "__gpu$xla.gpu.triton" in text
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("name", "shape", "num_gpus", "kinds"),
    [
        ("llama-8b", StepShape(8, 8, decode_only=True), 2, ("small", "norm_small")),
        ("llama-8b", StepShape(256, 256, decode_only=True), 2, ("large", "norm_large")),
        ("llama-8b", StepShape(4096, 256, decode_only=False), 2, ("large", "norm_large")),
        ("llama-8b", StepShape(8, 8, decode_only=True), 8, ("small", "norm_small")),
        ("llama-13b", StepShape(8, 8, decode_only=True), 4, ("small", "norm_small")),
        ("llama-70b", StepShape(8, 8, decode_only=True), 8, ("small", "norm_small")),
    ],
    ids=str,
)
def test_gpus_add_up_in_kernels_of_ours_and_xla_has_no_collective_left(
    name: str, shape: StepShape, num_gpus: int, kinds: tuple[str, ...]
) -> None:
    text = lower_step_for_cuda(name, "triton", shape, num_gpus)
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "collective_permute"):
        assert f"stablehlo.{collective}" not in text
    every_kind = ("small", "large", "norm_small", "norm_large")
    assert {kind for kind in every_kind if f'"all_reduce_{kind}' in text} == set(kinds)
    # For the embedding, behind attention (in a function that all layers of a kind call), behind the
    # three feed-forward layers: the last sum has no norm in it.
    num_kinds_of_layers = len(re.findall(r"func.func private @_run_layer\w*\(", text))
    num_sums = len(re.findall(r"call @_add_(?:small|large|rows|large_rows)(?:_\d+)?\(", text))
    assert num_sums == 1 + num_kinds_of_layers + 3
    assert "all_gather_small" in text  # the most likely tokens


def test_the_last_layer_of_a_long_step_brings_no_kernel_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, str | None]] = []

    def spy(
        x: jax.Array, *args: Any, implementation: str | None, target: Target, **kwargs: Any
    ) -> jax.Array:
        found.append((x.shape[0], implementation))
        return gated_product_reference(x, *args, **kwargs)

    monkeypatch.setattr("jaxengine.layers.mlp.gated_product", spy)
    not_traced_before = StepShape(96, 24, decode_only=False)
    lower_step_for_cuda("llama-8b", "xla", not_traced_before)
    assert found == [(96, None), (24, "reference")]


def test_caches_tables_and_tokens_are_donated_on_the_gpu_too() -> None:
    text = lower_step_for_cuda("llama-8b", "xla", DECODE)
    signature = next(line for line in text.splitlines() if "func.func public @main" in line)
    donated = [a for a in signature.split("%arg") if "aliasing_output" in a or "buffer_donor" in a]
    assert sum("1000x8x16x128xbf16" in argument for argument in donated) == 6
    assert len(donated) == 8


@pytest.mark.skipif(not HAS_NEW_MOSAIC, reason="the newer Mosaic kernels need jax 0.11")
@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        (StepShape(256, 256, decode_only=True), {"gated_product_mosaic"}),
        (StepShape(128, 128, decode_only=False), set()),
        (StepShape(2048, 1024, decode_only=False), {"gated_product_mosaic"}),
        (
            StepShape(8192, 1024, decode_only=False),
            {"gated_product_mosaic", "ragged_attention_mosaic"},
        ),
    ],
    ids=["decode", "short", "mixed", "long"],
)
def test_on_hopper_a_step_takes_the_mosaic_kernels_that_are_faster(
    shape: StepShape, kernels: set[str]
) -> None:
    text = lower_step_for_cuda("llama-8b", None, shape)
    found = {name for name in MOSAIC_KERNELS if name in text}
    assert found == kernels
    assert "stablehlo.while" not in text


def test_the_specification_of_the_weights_names_only_the_tensor_axis() -> None:
    config = ModelConfig.from_hf(
        {
            **LLAMA_8B,
            "vocab_size": 512,
            "num_hidden_layers": 1,
            "max_position_embeddings": 64,
        }
    )
    factory = ModelRegistry.resolve(config.architecture)
    options = ModelOptions(max_model_len=64, target=H100)
    _, specs = param_specs(lambda: factory(config, options))
    assert {axis for spec in specs.values() for axis in spec.spec} == {None, TENSOR_AXIS}
    assert specs["norm.weight"].spec == P(None)
