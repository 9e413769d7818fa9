"""The compiled step: no copy of the cache, one transfer, and it lowers for the GPU."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxengine import LLM, SamplingParams
from jaxengine.batch import StepShape
from jaxengine.config import ModelConfig
from jaxengine.engine.kv_cache import KVCacheSpec
from jaxengine.engine.step import StageParts, make_forward
from jaxengine.models.decoder import DecoderLayer, ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.sharding import TENSOR_AXIS
from jaxengine.weights import param_specs
from pallas_kernels.gated_product_reference import gated_product_reference
from tests.helpers import greedy, make_llm, random_prompts

MIXED = StepShape(16, 4, decode_only=False)
DECODE = StepShape(4, 4, decode_only=True)
SHAPES = pytest.mark.parametrize("shape", [MIXED, DECODE], ids=["mixed", "decode"])
NUM_BLOCKS = 4097
CACHE_BYTES = NUM_BLOCKS * 2 * 3 * 2 * 16 * 8 * 4  # k and v, layers, heads, slots, head_dim, bytes


@pytest.fixture(scope="module")
def large_cache_llm(chat_model: Any) -> LLM:
    return make_llm(chat_model, num_gpu_blocks_override=NUM_BLOCKS)


@SHAPES
def test_the_step_updates_the_cache_in_place(large_cache_llm: LLM, shape: StepShape) -> None:
    compiled = large_cache_llm.engine.runner.stages[0].program(shape)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= CACHE_BYTES
    assert memory.temp_size_in_bytes < CACHE_BYTES / 50
    cache = re.escape(f"f32[{NUM_BLOCKS},2,16,8]")
    assert re.search(cache, compiled.as_text())
    assert not re.search(rf"= {cache}\S* copy", compiled.as_text())


def test_old_caches_tables_and_tokens_are_given_up(large_cache_llm: LLM) -> None:
    (stage,) = large_cache_llm.engine.runner.stages
    before = [*jax.tree.leaves(stage.caches), stage.tables, stage.last_tokens]
    large_cache_llm.generate([[10, 11, 12]], greedy(2), use_tqdm=False)
    assert len(before) == 8
    assert all(array.is_deleted() for array in before)


class Transfers:
    """Counts what each step sends to the device; anything it would send unseen is an error."""

    def __init__(self, runner: Any, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[int]] = []
        (stage,) = runner.stages
        patch.setattr(runner, "execute", functools.partial(self._execute, runner.execute))
        patch.setattr(stage, "program", functools.partial(self._program, stage.program))
        sample = runner._samplers.sample
        patch.setattr(runner._samplers, "sample", self._sending(sample))

    def _execute(self, execute: Callable, step: Any) -> Any:
        self.steps.append([])
        with jax.transfer_guard_host_to_device("disallow"):
            return execute(step)

    def _program(self, program: Callable, *key: Any) -> Callable:
        with jax.transfer_guard_host_to_device("allow"):  # compiling makes constants
            return self._sending(program(*key))

    def _sending(self, function: Callable) -> Callable:
        def send(*arguments: Any, **options: Any) -> Any:
            return function(*map(self._put, arguments), **options)

        return send

    def _put(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        self.steps[-1].append(value.nbytes)
        return jax.device_put(value)


@pytest.fixture
def transfers(llm: LLM) -> Iterator[Transfers]:
    llm.generate(random_prompts(20, 5), SamplingParams(max_tokens=4), use_tqdm=False)  # compile
    with pytest.MonkeyPatch.context() as patch:
        yield Transfers(llm.engine.runner, patch)


def test_a_greedy_step_sends_one_array(llm: LLM, transfers: Transfers) -> None:
    llm.generate(random_prompts(20, 5, 33, 7, 9), greedy(20), use_tqdm=False)
    assert len(transfers.steps) > 20
    assert {len(sent) for sent in transfers.steps} == {1}
    assert max(sent[0] for sent in transfers.steps) <= 4 * MIXED.packed_size


def test_a_sampling_step_sends_one_array_more(llm: LLM, transfers: Transfers) -> None:
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    llm.generate(random_prompts(20, 5), params, use_tqdm=False)
    counts = Counter(len(sent) for sent in transfers.steps)
    assert counts[2] >= 20  # a step that samples nothing, inside a prompt, sends one
    assert set(counts) <= {1, 2}


def test_layers_of_a_kind_are_traced_once(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    call = DecoderLayer.__call__

    def count(self: Any, *args: Any) -> Any:
        calls.append(self)
        return call(self, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", count)
    llm = make_llm(chat_model, num_gpu_blocks_override=77)  # a cache not traced before
    llm.engine.runner.stages[0].program(DECODE)
    assert len(calls) == 1
    # In a mixed step the last of the three layers is of another kind: it serves last tokens only.
    llm.engine.runner.stages[0].program(MIXED)
    assert len(calls) == 3


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
H100 = jax.sharding.AbstractMesh(
    (1,),
    (TENSOR_AXIS,),
    abstract_device=jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100", num_cores=132, platform="gpu"
    ),
)


def lower_step_for_cuda(name: str, backend: str | None, shape: StepShape) -> str:
    sizes = {"vocab_size": 512, "num_hidden_layers": 3, "max_position_embeddings": 8192}
    config = ModelConfig.from_hf({**sizes, **MODELS[name]}, "bfloat16")
    options = ModelOptions(
        num_kv_heads=config.num_kv_heads, max_model_len=8192, attention_backend=backend
    )
    factory = ModelRegistry.resolve(config.architecture)
    definition, specs = param_specs(lambda: factory(config, options))
    parts = StageParts(definition, specs, H100, range(3))
    forward = make_forward(shape, parts=parts, block_size=16)
    cache = KVCacheSpec(3, config.num_kv_heads, config.head_dim, 16, "bfloat16").shape(1000)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    arguments = (
        {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in specs.items()},
        [(jax.ShapeDtypeStruct(cache, jnp.bfloat16),) * 2] * 3,
        ints((257, 512)),
        ints((256,)),
        ints((shape.packed_size,)),
    )
    with jax.sharding.use_abstract_mesh(H100):
        return forward.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


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
    try:
        text = lower_step_for_cuda(name, backend, shape)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    kernel = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu", "xla": "stablehlo.while"}
    assert kernel[backend] in text
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
@SHAPES
def test_what_a_gpu_chooses_lowers_for_cuda_and_is_a_kernel_of_ours(
    name: str, shape: StepShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = lower_step_for_cuda(name, None, shape)
    assert "mosaic_gpu" in text or "__gpu$xla.gpu.triton" in text
    assert "stablehlo.while" not in text


def test_the_last_layer_of_a_long_step_brings_no_kernel_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, str | None]] = []

    def spy(x: jax.Array, *args: Any, implementation: str | None, **kwargs: Any) -> jax.Array:
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
    options = ModelOptions(num_kv_heads=8, max_model_len=64)
    _, specs = param_specs(lambda: factory(config, options))
    assert {axis for spec in specs.values() for axis in spec.spec} == {None, TENSOR_AXIS}
    assert specs["norm.weight"].spec == P(None)
