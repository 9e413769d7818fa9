"""Puts an engine together from EngineConfig, whose only reader this is."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax

from jaxengine.batch import StepShape
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.engine import memory
from jaxengine.engine.block_pool import BlockPool
from jaxengine.engine.buckets import Buckets
from jaxengine.engine.engine import MAX_IN_FLIGHT, Engine
from jaxengine.engine.kv_cache import KVCacheSpec
from jaxengine.engine.model_runner import ModelParts, ModelRunner
from jaxengine.engine.scheduler import Scheduler
from jaxengine.models.decoder import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.sharding import check_tensor_parallel_size, make_mesh
from jaxengine.weights import Checkpoint, Params, load_params, param_specs, random_params


@dataclasses.dataclass(frozen=True)
class Startup:
    """What the start did: seconds of its parts, one after the other, and where the memory goes.

    Attributes:
        compile_seconds: Seconds of each step's program; several compile at a time.
    """

    model: ModelConfig
    device_kind: str
    num_devices: int
    compile_s: float
    load_s: float
    compile_seconds: Mapping[StepShape, float]
    budget: memory.MemoryBudget

    def text(self) -> str:
        """The report that an engine prints when it is ready."""
        devices = f"{self.num_devices} x {self.device_kind}"
        lines = [
            f"{self.model.architecture} in {self.model.dtype} on {devices}",
            self.budget.table(),
            f"  weights loaded in {self.load_s:.1f} s; {self._programs()}",
        ]
        return "\n".join(lines)

    def _programs(self) -> str:
        if not self.compile_seconds:
            return "steps compile when they are first needed"
        shape, slowest = max(self.compile_seconds.items(), key=lambda item: item[1])
        return (
            f"{len(self.compile_seconds)} step programs in {self.compile_s:.1f} s (slowest: "
            f"{shape.num_tokens} tokens, {shape.num_rows} rows, {slowest:.1f} s)"
        )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What EngineConfig leaves open, decided from model and device."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    min_mixed_tokens: int
    min_decode_rows: int
    compiles_at_start: bool


def resolve_limits(config: EngineConfig, model: ModelConfig, device: jax.Device) -> Limits:
    """Fill in the limits that the user left open, as vLLM does.

    Raises:
        ValueError: If ``max_model_len`` is more than the model was made for.
    """
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings and model.rope.rope_type == "default":
        raise ValueError(
            f"max_model_len {max_model_len} is more than the model's max_position_embeddings "
            f"{model.max_position_embeddings}: lower it, or set rope_scaling with --hf-overrides"
        )
    is_cpu = device.platform == "cpu"
    is_hopper = any(name in device.device_kind for name in ("H100", "H200", "B200", "GH200"))
    # A CPU gains nothing from longer steps than 512, and padding them costs it real time.
    tokens, seqs = (16384, 1024) if is_hopper else (512, 256) if is_cpu else (8192, 256)
    max_num_seqs = config.max_num_seqs or seqs
    budget = config.max_num_batched_tokens or max(tokens, max_num_seqs)
    if budget < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens {budget} is less than max_num_seqs {max_num_seqs}: every "
            "running request needs one token a step"
        )
    if not config.enable_chunked_prefill:
        budget = max(budget, max_model_len)
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        min_mixed_tokens=min(16 if is_cpu else 64, budget),
        min_decode_rows=1 if is_cpu else 8,
        compiles_at_start=not (is_cpu or config.enforce_eager),
    )


def build_engine(
    config: EngineConfig, checkpoint: Checkpoint, eos_token_ids: frozenset[int]
) -> tuple[Engine, Startup]:
    """Load a model and make it ready to serve.

    Raises:
        ValueError: If the model is not supported, the checkpoint is damaged, the flags
            contradict each other, or memory does not suffice.
    """
    devices = jax.devices()
    size = config.tensor_parallel_size
    if size > len(devices):
        raise ValueError(
            f"tensor_parallel_size {size} needs {size} devices but there are {len(devices)}: "
            f"use at most {len(devices)}"
        )
    model = read_model_config(config, checkpoint, devices[0])
    limits = resolve_limits(config, model, devices[0])
    parts, cache_spec = _build_parts(config, model, limits, devices[:size])
    runner = ModelRunner(
        parts,
        cache_spec=cache_spec,
        buckets=Buckets(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            min_mixed_tokens=limits.min_mixed_tokens,
            min_decode_rows=limits.min_decode_rows,
        ),
        max_num_seqs=limits.max_num_seqs,
        max_blocks_per_seq=-(-limits.max_model_len // config.block_size),
    )
    started = time.perf_counter()
    budget = _plan_memory(runner, config, parts, cache_spec, limits)
    num_blocks = budget.num_blocks
    if limits.compiles_at_start:
        # Before the weights and the cache are there: XLA tries out products in the free memory.
        runner.compile_all(num_blocks, show_progress=not config.disable_log_stats)
    compiled = time.perf_counter()
    runner.start(_load(config, checkpoint, parts), num_blocks)
    if limits.compiles_at_start:
        runner.warm_up_samplers()
    startup = Startup(
        model=model,
        device_kind=devices[0].device_kind,
        num_devices=size,
        compile_s=compiled - started,
        load_s=time.perf_counter() - compiled,
        compile_seconds=dict(runner.compile_seconds),
        budget=budget,
    )
    scheduler = Scheduler(
        block_pool=BlockPool(num_blocks, config.block_size, config.enable_prefix_caching),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        policy=config.scheduling_policy,
        max_in_flight=MAX_IN_FLIGHT if config.async_scheduling else 1,
        sliding_window=model.uniform_sliding_window,
    )
    engine = Engine(
        scheduler,
        runner,
        model_config=model,
        eos_token_ids=eos_token_ids,
        seed=config.seed,
        max_in_flight=MAX_IN_FLIGHT if config.async_scheduling else 1,
    )
    return engine, startup


def read_model_config(
    config: EngineConfig, checkpoint: Checkpoint, device: jax.Device
) -> ModelConfig:
    """Translate the checkpoint's config and decide what ``dtype="auto"`` means.

    On a CPU it is float32, the fastest type there; on a GPU a 16-bit checkpoint is served as it is
    stored, and any other (float32, GGUF) in bfloat16.
    """
    hf = {**checkpoint.hf_config, **config.hf_overrides}
    if not hf.get("architectures"):
        raise ValueError("config.json names no architecture: add an 'architectures' list to it")
    ModelRegistry.resolve(hf["architectures"][0])
    dtype = config.dtype
    stored = str(hf.get("dtype") or hf.get("torch_dtype") or "").removeprefix("torch.")
    if dtype == "auto" and device.platform == "cpu":
        dtype = "float32"
    elif dtype == "auto" and stored not in ("bfloat16", "float16"):
        dtype = "bfloat16"
    return ModelConfig.from_hf(hf, dtype)


def _build_parts(
    config: EngineConfig, model: ModelConfig, limits: Limits, devices: Sequence[jax.Device]
) -> tuple[ModelParts, KVCacheSpec]:
    check_tensor_parallel_size(
        len(devices),
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
    )
    options = ModelOptions(
        num_kv_heads=max(model.num_kv_heads, len(devices)),
        max_model_len=limits.max_model_len,
        attention_backend=config.attention_backend,
        input_major=devices[0].platform == "cpu",
    )
    factory = ModelRegistry.resolve(model.architecture)
    definition, specs = param_specs(lambda: factory(model, options))
    cache_spec = KVCacheSpec(
        num_layers=model.num_layers,
        num_kv_heads=options.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        dtype=model.dtype,
    )
    activation_size = 3 * model.intermediate_size + 2 * model.hidden_size
    parts = ModelParts(definition, specs, make_mesh(devices), model.vocab_size, activation_size)
    return parts, cache_spec


def _load(config: EngineConfig, checkpoint: Checkpoint, parts: ModelParts) -> Params:
    if config.load_format == "dummy":
        params = random_params(parts.specs, parts.mesh, config.seed)
    else:
        show_progress = not config.disable_log_stats
        params = load_params(checkpoint, parts.specs, parts.mesh, show_progress=show_progress)
    return jax.block_until_ready(params)


def _plan_memory(
    runner: ModelRunner,
    config: EngineConfig,
    parts: ModelParts,
    cache_spec: KVCacheSpec,
    limits: Limits,
) -> memory.MemoryBudget:
    """Decide the number of KV blocks, and account for the rest."""
    device = parts.mesh.devices.flat[0]
    num_shards = parts.mesh.size
    block_bytes = cache_spec.block_bytes // num_shards
    weight_bytes = sum(
        spec.num_bytes // (num_shards if any(spec.spec) else 1) for spec in parts.specs.values()
    )
    blocks_per_seq = -(-limits.max_model_len // config.block_size)
    most_useful = limits.max_num_seqs * blocks_per_seq + 1
    is_cpu = device.platform == "cpu"
    total, limit = memory.device_limit(device, config.gpu_memory_utilization)
    step_bytes = 0  # on a CPU, programs are compiled later, and their temporaries are small
    if config.num_gpu_blocks_override or config.kv_cache_memory_bytes or is_cpu:
        default_bytes = min(memory.MAX_CPU_CACHE_BYTES, limit // 4)
        bytes_wanted = config.kv_cache_memory_bytes or default_bytes
        num_blocks = config.num_gpu_blocks_override or min(bytes_wanted // block_bytes, most_useful)
        memory.check_fits(limit, weight_bytes + runner.state_bytes, num_blocks * block_bytes)
    else:
        num_blocks, step_bytes = _fit_blocks(
            runner,
            limit_bytes=limit,
            weight_bytes=weight_bytes,
            block_bytes=block_bytes,
            most_useful=most_useful,
            compile_all=limits.compiles_at_start,
            show_progress=not config.disable_log_stats,
        )
    return memory.MemoryBudget(
        total_bytes=total,
        limit_bytes=limit,
        weight_bytes=weight_bytes,
        step_bytes=step_bytes,
        state_bytes=runner.state_bytes,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        block_size=config.block_size,
    )


def _fit_blocks(
    runner: ModelRunner,
    *,
    limit_bytes: int,
    weight_bytes: int,
    block_bytes: int,
    most_useful: int,
    compile_all: bool,
    show_progress: bool,
) -> tuple[int, int]:
    """Return how many KV blocks fit, and the bytes of the largest step.

    The cache's size is part of the compiled programs, and what they need decides it. So they are
    compiled for a guess, which stays if it fits and wastes little.
    """

    def fit(step_bytes: int) -> int:
        blocks = memory.num_blocks_that_fit(
            limit_bytes=limit_bytes,
            weight_bytes=weight_bytes,
            step_bytes=step_bytes,
            state_bytes=runner.state_bytes,
            block_bytes=block_bytes,
        )
        return min(blocks, most_useful)

    guess = fit(runner.guess_step_bytes())
    if compile_all:  # the largest program beside all others, rather than before them
        runner.compile_all(guess, show_progress=show_progress)
    step_bytes = runner.measure(guess)
    exact = fit(step_bytes)
    return (guess if exact * 0.97 <= guess <= exact else exact), step_bytes
