"""Puts an engine together from EngineConfig: scheduler, stages, weights, compiled steps."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxengine.config import EngineConfig
from jaxengine.engine.device.buckets import Buckets
from jaxengine.engine.device.kv_cache import KVCacheSpec, kv_heads
from jaxengine.engine.device.model_runner import ModelRunner, RunnerHooks
from jaxengine.engine.device.output_buffers import OutputBuffers
from jaxengine.engine.device.peer_memory import PeerMemory, reach_each_other
from jaxengine.engine.device.program_cache import ProgramCache, cache_directory
from jaxengine.engine.device.stage import Stage
from jaxengine.engine.device.step import StageParts
from jaxengine.engine.engine import Engine
from jaxengine.engine.limits import Limits, resolve_limits
from jaxengine.engine.memory_plan import plan_memory
from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.start_report import Startup
from jaxengine.model_config import ModelConfig
from jaxengine.models.options import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.pallas_kernels.peers import inbox_layout
from jaxengine.pallas_kernels.target import Target
from jaxengine.sharding import check_tensor_parallel_size, make_mesh, split_layers
from jaxengine.weights import Checkpoint, Params, load_params, param_specs, random_params


def build_engine(
    config: EngineConfig,
    checkpoint: Checkpoint,
    eos_token_ids: frozenset[int],
    devices: Sequence[jax.Device] | None = None,
    hooks: RunnerHooks = RunnerHooks(),  # noqa: B008 (immutable)
) -> tuple[Engine, Startup]:
    """Load a model and make it ready to serve.

    Args:
        config: What the user asked for.
        checkpoint: From ``open_model``.
        eos_token_ids: Tokens that end a request.
        devices: Those of one replica; None takes the first ones there are.
        hooks: For what drives the runners of other hosts.

    Raises:
        ValueError: If the model is not supported, the checkpoint is damaged, the flags
            contradict each other, or memory does not suffice.
    """
    runner, startup, limits = build_runner(config, checkpoint, devices, hooks)
    scheduler = Scheduler(
        block_pool=BlockPool(
            startup.budget.num_blocks, config.block_size, config.enable_prefix_caching
        ),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        policy=config.scheduling_policy,
        max_in_flight=runner.max_in_flight,
        num_stages=len(runner.stages),
        sliding_window=startup.model.uniform_sliding_window,
        step_sizes=runner.fitted_step_tokens,
        can_raise_max_model_len=limits.max_model_len < startup.model.max_position_embeddings,
    )
    engine = Engine(
        scheduler,
        runner,
        model_config=startup.model,
        eos_token_ids=eos_token_ids,
        seed=config.seed,
    )
    return engine, startup


def build_runner(
    config: EngineConfig,
    checkpoint: Checkpoint,
    devices: Sequence[jax.Device] | None = None,
    hooks: RunnerHooks = RunnerHooks(),  # noqa: B008 (immutable)
) -> tuple[ModelRunner, Startup, Limits]:
    """Load a model onto its devices and compile its steps: an engine without a scheduler.

    Raises:
        ValueError: As ``build_engine``.
    """
    devices = choose_devices(config, jax.devices() if devices is None else devices)
    model = read_model_config(config, checkpoint, devices[0])
    limits = resolve_limits(config, model, devices[0])
    runner = _new_runner(config, model, limits, devices, hooks)
    started = time.perf_counter()
    budget = plan_memory(runner, config, limits, hooks.agree_on_blocks)
    budget = dataclasses.replace(budget, num_blocks=hooks.agree_on_blocks(budget.num_blocks))
    runner.set_num_blocks(budget.num_blocks)
    if limits.compiles_at_start:
        # Before the weights and the cache are there: XLA tries out products in the free memory.
        runner.compile_all(show_progress=not config.disable_log_stats)
    compiled = time.perf_counter()
    runner.start([load_weights(config, checkpoint, stage.parts) for stage in runner.stages])
    if limits.compiles_at_start:
        runner.warm_up_samplers()
    startup = Startup(
        model=model,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        compile_s=compiled - started,
        load_s=time.perf_counter() - compiled,
        compile_seconds=runner.compile_seconds,
        budget=budget,
    )
    return runner, startup, limits


def choose_devices(config: EngineConfig, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """Return the devices of one replica, stage by stage.

    With several hosts the last stage is on the first one, whose process reads the tokens.

    Raises:
        ValueError: If there are too few.
    """
    tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
    if tensor * pipeline > len(devices):
        raise ValueError(
            f"tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} needs "
            f"{tensor * pipeline} devices but there are {len(devices)}: lower one of them"
        )
    chosen = list(devices[: tensor * pipeline])
    if pipeline > 1:
        chosen.sort(key=lambda device: -device.process_index)  # stable: ids stay in order
    return chosen


def read_model_config(
    config: EngineConfig, checkpoint: Checkpoint, device: jax.Device
) -> ModelConfig:
    """Translate the checkpoint's config and decide what ``dtype="auto"`` means.

    On a CPU it is float32, the fastest type there; on a GPU a 16-bit checkpoint is served as it is
    stored, and any other (float32, GGUF) in bfloat16.
    """
    hf, dtype = checkpoint.hf_config, config.dtype
    stored = str(hf.get("dtype") or hf.get("torch_dtype") or "").removeprefix("torch.")
    if dtype == "auto" and device.platform == "cpu":
        dtype = "float32"
    elif dtype == "auto" and stored not in ("bfloat16", "float16"):
        dtype = "bfloat16"
    return ModelConfig.from_hf(hf, dtype)


def check_hf_config(hf: Mapping[str, Any]) -> None:
    """Judge a model by its config.json alone, before anything else of it is fetched or read.

    Raises:
        ValueError: If it cannot be served.
    """
    ModelConfig.from_hf(hf)


def _new_runner(
    config: EngineConfig,
    model: ModelConfig,
    limits: Limits,
    devices: Sequence[jax.Device],
    hooks: RunnerHooks,
) -> ModelRunner:
    size = config.tensor_parallel_size
    check_tensor_parallel_size(
        size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        mixtures=[(own.num_experts, own.intermediate_size) for own in model.mixtures],
    )
    # A step in each stage and one waiting, so that the devices never wait for the host.
    max_in_flight = config.pipeline_parallel_size + config.async_scheduling
    stages = []
    for number, layers in enumerate(split_layers(model.num_layers, config.pipeline_parallel_size)):
        mesh = make_mesh(devices[number * size : (number + 1) * size])
        stages.append(_build_stage(config, model, limits, mesh, layers, max_in_flight))
    return ModelRunner(
        stages,
        buckets=Buckets(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            min_mixed_tokens=limits.min_mixed_tokens,
            min_decode_rows=limits.min_decode_rows,
        ),
        vocab_size=model.vocab_size,
        activation_size=model.activation_size,
        max_num_seqs=limits.max_num_seqs,
        max_in_flight=max_in_flight,
        hooks=hooks,
        logprobs_mode=config.logprobs_mode,
    )


def _build_stage(
    config: EngineConfig,
    model: ModelConfig,
    limits: Limits,
    mesh: Mesh,
    layers: range,
    max_in_flight: int,
) -> Stage:
    options = ModelOptions(
        max_model_len=limits.max_model_len,
        target=Target.of(mesh.devices.flat[0]),
        layers=layers,
        num_shards=mesh.size,
        attention_backend=config.attention_backend,
        input_major=mesh.devices.flat[0].platform == "cpu",
    )
    factory = ModelRegistry.resolve(model.architecture)
    definition, specs = param_specs(lambda: factory(model, options))
    parts = StageParts(
        definition,
        specs,
        mesh,
        layers,
        is_first=layers.start == 0,
        is_last=layers.stop == model.num_layers,
    )
    cache_spec = KVCacheSpec(
        heads=kv_heads(model, layers, mesh.size),
        block_size=config.block_size,
        dtype=model.dtype,
    )
    return Stage(
        parts,
        cache_spec=cache_spec,
        hidden_size=model.hidden_size,
        max_num_seqs=limits.max_num_seqs,
        max_blocks_per_seq=-(-limits.max_model_len // config.block_size),
        program_cache=_program_cache(parts, (model, options, definition, specs)),
        output_buffers=_output_buffers(parts, model, max_in_flight),
        peer_memory=_peer_memory(config, parts, model, limits),
    )


def _program_cache(parts: StageParts, facts: Sequence[object]) -> ProgramCache | None:
    """Return where a stage's steps are kept; None on a CPU, which compiles when it must.

    With several hosts jax's cache serves alone: what one of them has, all must have.
    """
    directory = cache_directory()
    if directory is None or parts.is_on_cpu or jax.process_count() > 1:
        return None
    facts = (*facts, parts.layers, parts.is_first, parts.is_last)
    return ProgramCache(directory, list(parts.mesh.devices.flat), facts)


def overwrites_outputs(parts: StageParts) -> bool:
    """Whether steps write to the outputs of earlier ones; a CPU has no graphs that it spares."""
    return parts.is_last and not parts.is_on_cpu


def _output_buffers(
    parts: StageParts, model: ModelConfig, max_in_flight: int
) -> OutputBuffers | None:
    if not overwrites_outputs(parts):
        return None
    return OutputBuffers(
        parts.mesh, vocab_size=model.vocab_size, dtype=model.dtype, max_in_flight=max_in_flight
    )


def _peer_memory(
    config: EngineConfig, parts: StageParts, model: ModelConfig, limits: Limits
) -> PeerMemory | None:
    devices = list(parts.mesh.devices.flat)
    if config.disable_custom_all_reduce or len(devices) == 1 or not reach_each_other(devices):
        return None
    max_elements = limits.max_num_batched_tokens * model.hidden_size
    return PeerMemory(parts.mesh, inbox_layout(len(devices), max_elements, Target.of(devices[0])))


def load_weights(config: EngineConfig, checkpoint: Checkpoint, parts: StageParts) -> Params:
    """Load a stage's weights onto its devices; returns when they are there."""
    if config.load_format == "dummy":
        params = random_params(parts.specs, parts.mesh, config.seed)
    else:
        show_progress = not config.disable_log_stats
        params = load_params(checkpoint, parts.specs, parts.mesh, show_progress=show_progress)
    return jax.block_until_ready(params)
