"""vLLM's engine arguments: which are ours, which change nothing here, which are refused.

One row an argument that ``EngineConfig`` does not have. The rows serve ``LLM(...)``, the command
line and docs/coming-from-vllm.md. Names and defaults are those of vLLM 0.33; those that it had once
and scripts still give are listed with the release that they belong to.

Standard library only.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxengine.compat.similar_names import did_you_mean
from jaxengine.config import EngineConfig

logger = logging.getLogger(__name__)

Kind = Literal["ignored", "refused", "translated"]
FORMER = "former"  # in the note of what vLLM has given up
SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Row:
    """An argument of vLLM that is no field of EngineConfig.

    Attributes:
        name: As vLLM spells it.
        default: Its default there; None and what is empty are never asked for.
        kind: "ignored": it makes no difference to results here; any value is taken, with one
            warning if it asks for something. "refused": any value but the default is an error.
            "translated": it becomes other fields.
        note: Why it makes no difference; what to do instead; or what it becomes.
        also: Further values that ask for nothing.
    """

    name: str
    default: Any
    kind: Kind
    note: str
    also: tuple[Any, ...] = ()

    def is_asked_for(self, value: Any) -> bool:
        """Whether a value wants something else than what happens anyway."""
        if value is None or (isinstance(value, dict | list | tuple | set | str) and not value):
            return False
        return not any(type(value) is type(each) and value == each for each in self._neutral())

    def _neutral(self) -> Iterable[Any]:
        return (self.default, *self.also)


def _rows(kind: Kind, note: str, *arguments: Any) -> list[Row]:
    """Rows that share a note; an argument is a name, or (name, default, further values)."""
    rows = []
    for argument in arguments:
        name, default, *also = argument if isinstance(argument, tuple) else (argument, None)
        rows.append(Row(name, default, kind, note, tuple(also)))
    return rows


_TEXT_ONLY = "models here read text only"
_NO_CODE = "no code from a checkpoint is ever run"
_COMPILED = "XLA compiles every step ahead of time"
_NO_MIXTURE = "there are no mixtures of experts or state-space models yet"
_OWN_SCHEDULER = "the scheduler has no such setting"
_OBSERVED = "nothing is sent or traced unless start_profile is called"

ROWS: tuple[Row, ...] = (
    # What becomes something else.
    *_rows("translated", "task, if it is not 'auto'", ("runner", "auto")),
    *_rows("translated", "only 'auto' and 'none' are served", ("convert", "auto", "none")),
    *_rows("translated", f"{FORMER}: pooler_config", "override_pooler_config"),
    *_rows("translated", f"{FORMER}: hf_overrides={{'rope_scaling': ...}}", "rope_scaling"),
    *_rows("translated", f"{FORMER}: hf_overrides={{'rope_theta': ...}}", "rope_theta"),
    *_rows("translated", "reasoning_parser, if it has one", "structured_outputs_config"),
    *_rows("translated", "profiler_dir, its torch_profiler_dir", "profiler_config"),
    *_rows("translated", "environment variable HF_TOKEN", "hf_token"),
    # What changes nothing here.
    *_rows(
        "ignored",
        _COMPILED,
        *(("compilation_config", None, 0, 1, 2, 3), ("optimization_level", None, 0, 1, 2, 3)),
        *("cudagraph_capture_sizes", "max_cudagraph_capture_size", ("cudagraph_metrics", False)),
        *("ir_op_priority", "kernel_config", "enable_flashinfer_autotune", ("monokernel", False)),
        *(("performance_mode", "balanced"), ("jit_monitor_mode", "warn")),
        *(("jit_monitor_verbose", False), ("fail_on_environ_validation", False)),
        *("cuda_graph_sizes", "max_seq_len_to_capture", "max_context_len_to_capture"),
    ),
    *_rows(
        "ignored",
        "the kernels are Pallas' and XLA's; see attention_backend",
        *("attention_config", ("linear_backend", "auto"), ("moe_backend", "auto")),
        *(("sparse_indexer_topk_backend", "auto"), "disable_cascade_attn"),
        *("gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend"),
        *(("use_fp64_gumbel", False), ("all2all_backend", "allgather_reducescatter")),
    ),
    *_rows(
        "ignored",
        _NO_MIXTURE,
        *(("enable_expert_parallel", False), ("enable_ep_weight_filter", False)),
        *(("enable_elastic_ep", False), "elastic_ep_max_dp_size", "eplb_config"),
        *(("enable_eplb", False), ("expert_placement_strategy", "linear")),
        *("mamba_config", ("mamba_cache_dtype", "auto"), ("mamba_ssm_cache_dtype", "auto")),
        *("mamba_block_size", "mamba_cache_mode", ("mamba_backend", "triton")),
        *("mamba_ssu_algorithm", ("enable_mamba_cache_stochastic_rounding", False)),
        *(("mamba_cache_philox_rounds", 0), ("enable_mamba_shared_prefix_checkpoint", False)),
        *(("replayssm_buffer_len", 16), ("use_replayssm", False), "engram_config"),
    ),
    *_rows(
        "ignored",
        _TEXT_ONLY,
        *(("allowed_local_media_path", ""), "allowed_media_domains", "limit_mm_per_prompt"),
        *(("language_model_only", False), ("enable_mm_embeds", False)),
        *(("interleave_mm_strings", False), "media_io_kwargs", "mm_processor_kwargs"),
        *(("mm_processor_cache_gb", 4, 0), ("mm_processor_cache_type", "lru")),
        *(("mm_hasher_algorithm", "blake3"), ("mm_shm_cache_max_object_size_mb", 128)),
        *(("mm_encoder_only", False), ("mm_encoder_tp_mode", "weights")),
        *("mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path"),
        *("mm_encoder_fp8_scale_save_path", ("mm_encoder_fp8_scale_save_margin", 1.5)),
        *(("skip_mm_profiling", False), "video_pruning_rate", ("video_pruning_method", "evs")),
        *(("mm_tensor_ipc", "direct_rpc"), ("mm_processor_device", "auto")),
        *(("mm_ipc_gpu_memory_gb", 0), ("mm_device_do_normalize", True)),
        *(("enable_mm_processor_stats", False), ("disable_chunked_mm_input", False)),
        *("ec_transfer_config", "ec_manager_config", ("disable_mm_preprocessor_cache", False)),
        *("io_processor_plugin", ("renderer_num_workers", 1)),
    ),
    *_rows(
        "ignored",
        "memory that does not suffice is an error that says so",
        *(("cpu_offload_gb", 0, 0.0), "cpu_offload_params", ("offload_backend", "auto")),
        *(("offload_group_size", 0), ("offload_num_in_group", 1), ("offload_prefetch_step", 1)),
        *("offload_params", ("swap_space", 4, 4.0, 0, 0.0), "kv_offloading_size"),
        *(("kv_offloading_backend", "native"), ("enable_cumem_allocator", False)),
        *(("enable_nccl_comm_suspend", False), ("enable_shm_tensor_arena", False)),
    ),
    *_rows(
        "ignored",
        "sleep and wake_up need no preparation",
        *(("enable_sleep_mode", False, True), ("sleep_mode_backend", "cumem")),
        *(("sleep_mode_offload_cudagraph", False), "sleep_preserve_parameter_names"),
    ),
    *_rows(
        "ignored",
        _OWN_SCHEDULER,
        *("max_num_scheduled_tokens", ("long_prefill_token_threshold_adaptive", False)),
        *("max_num_active_seqs", ("scheduler_reserve_full_isl", True)),
        *(("prefill_schedule_interval", 1), ("watermark", 0.0), "disable_hybrid_kv_cache_manager"),
        *(("stream_interval", 1), "preemption_mode", ("num_lookahead_slots", 0)),
        *(("num_scheduler_steps", 1), ("multi_step_stream_outputs", True)),
        *(("scheduler_delay_factor", 0.0), ("use_v2_block_manager", True)),
        *(("max_num_partial_prefills", 1), ("max_long_partial_prefills", 1)),
        *(("disable_async_output_proc", False), ("enable_batch_sharded_sampling", None)),
        *(("swa_bounded_replay", True), ("kv_sharing_fast_prefill", False)),
        *("prefix_match_unit", ("prefix_cache_retention_interval", 0)),
        *(("enable_dbo", False), ("ubatch_size", 0), ("dbo_decode_token_threshold", 32)),
        *(("dbo_prefill_token_threshold", 512), ("dp_sync_interval", 16)),
    ),
    *_rows(
        "ignored",
        "blocks are named by BLAKE2b, 32 bytes: cryptographic as sha256 is",
        ("prefix_caching_hash_algo", "sha256", "sha256_cbor", "xxhash", "xxhash_cbor", "builtin"),
    ),
    *_rows(
        "ignored",
        "how a checkpoint is read changes nothing in it",
        *("safetensors_load_strategy", "safetensors_prefetch_num_threads"),
        *("safetensors_prefetch_block_size", "model_loader_extra_config", "ignore_patterns"),
        *(("use_tqdm_on_load", True, False), ("pt_load_map_location", "cpu")),
        *("max_parallel_loading_workers", ("config_format", "auto", "hf"), "hf_config_path"),
    ),
    *_rows("ignored", _NO_CODE, "code_revision"),
    *_rows(
        "ignored",
        "there is one model implementation",
        ("model_impl", "auto", "vllm"),
        ("allow_deprecated_quantization", False),
    ),
    *_rows(
        "ignored",
        "speculation changes the time that an output takes, not the output",
        *("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        *(("per_request_spec_decode_metrics", "none"), "speculative_model"),
        *("num_speculative_tokens", "speculative_draft_tensor_parallel_size"),
    ),
    *_rows(
        "ignored",
        _OBSERVED,
        *("show_hidden_metrics_for_version", "otlp_traces_endpoint", "collect_detailed_traces"),
        *(("kv_cache_metrics", False), ("kv_cache_metrics_sample", 0.01)),
        *("custom_histogram_buckets", ("enable_layerwise_nvtx_tracing", False)),
        *(("enable_mfu_metrics", False), ("enable_logging_iteration_details", False)),
        *("logging_config", "log_level", "log_config_file", ("aggregate_engine_logging", False)),
        *(("enable_log_requests", False), ("disable_log_requests", False, True)),
        *(("ray_workers_use_nsight", False), "aux_output_config"),
    ),
    *_rows(
        "ignored",
        "LoRA is not there yet, and enable_lora is refused",
        *(("max_loras", 1), ("max_lora_rank", 16), "default_mm_loras", "max_cpu_loras"),
        *(("fully_sharded_loras", False), ("lora_dtype", "auto"), "lora_target_modules"),
        *(("enable_tower_connector_lora", False), ("specialize_active_lora", False)),
        *(("enable_mixed_moe_lora_format", False), ("enable_moe_shared_loras", False)),
        *("max_lora_cls_labels", ("lora_extra_vocab_size", 256), "long_lora_scaling_factors"),
    ),
    *_rows(
        "ignored",
        "processes and devices are laid out by jax",
        *("cpu_distributed_timeout_seconds", ("numa_bind", False), "numa_bind_nodes"),
        *("numa_bind_cpus", "dcp_comm_backend", "dcp_q_replicate"),
        *(("dcp_kv_cache_interleave_size", 1), "cp_kv_cache_interleave_size"),
        *(("data_parallel_backend", "mp", "ray"), "disable_nccl_for_dp_synchronization"),
        *("data_parallel_size_local", ("enable_hc_sp", False), ("shutdown_timeout", 0)),
        *(("enable_fault_tolerance", False), "fault_tolerance_config", "watchdog_config"),
        *(("worker_use_ray", False), ("engine_use_ray", False), ("device", "auto")),
        *(("tokenizer_pool_size", 0), "tokenizer_pool_type", "tokenizer_pool_extra_config"),
    ),
    *_rows("ignored", "used by a server only", "served_model_name", ("tokens_only", False)),
    *_rows(
        "ignored",
        "the backend is llguidance, whatever is asked for",
        ("guided_decoding_backend", "auto", "guidance", "llguidance"),
        ("guided_decoding_disable_fallback", False),
        ("guided_decoding_disable_any_whitespace", False),
        ("enable_reasoning", False, True),
    ),
    *_rows("ignored", "a KV cache in 16 bits needs no scales", ("calculate_kv_scales", False)),
    # What would change results or is not there.
    *_rows("refused", "merge the adapter into the checkpoint", ("enable_lora", False)),
    *_rows(
        "refused",
        "use a checkpoint with plain weights, or a GGUF file",
        ("quantization", None, "gguf"),
        "quantization_config",
    ),
    *_rows(
        "refused",
        "the cache has the model's dtype: leave it 'auto'",
        ("kv_cache_dtype", "auto"),
        "kv_cache_dtype_skip_layers",
    ),
    *_rows("refused", "only fast tokenizers are used", ("tokenizer_mode", "auto", "hf", "slow")),
    *_rows("refused", "set HF_HUB_CACHE, the hub's own variable", "download_dir"),
    *_rows("refused", "give the directory with the weights as model", ("model_weights", "")),
    *_rows("refused", "limit max_model_len to the window", ("disable_sliding_window", False)),
    *_rows("refused", "give token ids or text", ("enable_prompt_embeds", False)),
    *_rows(
        "refused",
        "edit logits with logit_bias, allowed_token_ids, bad_words or structured_outputs",
        "logits_processors",
    ),
    *_rows(
        "refused",
        "an engine has one process a host: use tensor_parallel_size, data_parallel_size, nnodes",
        *("data_parallel_rank", "data_parallel_start_rank", "data_parallel_address"),
        *("data_parallel_rpc_port", ("data_parallel_hybrid_lb", False)),
        *(("data_parallel_external_lb", False), ("data_parallel_multi_port_external_lb", False)),
        *(("prefill_context_parallel_size", 1), ("decode_context_parallel_size", 1)),
    ),
    *_rows("refused", "set CUDA_VISIBLE_DEVICES", "device_ids"),
    *_rows(
        "refused",
        "the engine's classes are fixed; models of other packages: ModelRegistry",
        *(("worker_cls", "auto"), ("worker_extension_cls", ""), "scheduler_cls"),
        *("model_class_overrides", "reasoning_parser_plugin", "additional_config"),
    ),
    *_rows(
        "refused",
        "the cache of an engine is its own",
        *("kv_transfer_config", "kv_events_config", "weight_transfer_config"),
    ),
    *_rows(
        "refused",
        "there is no such output",
        *(("enable_return_routed_experts", False), ("return_sampling_mask", False)),
        *(("enable_trace_replay", False), "watermark_config", "diffusion_config"),
        "reasoning_config",
    ),
    *_rows("refused", "only a server has a queue", "max_num_queued_reqs", "max_num_queued_tokens"),
)  # fmt: skip
ROW_OF = {row.name: row for row in ROWS}
FIELD_NAMES = tuple(field.name for field in dataclasses.fields(EngineConfig))

# vLLM's attention backends: which kernel computes a value is no part of the value.
_BACKENDS_OF_VLLM = re.compile(r"[A-Z0-9_]+(_ATTN|_MLA|INFER|_FA\d?|SDPA|ATTENTION)[A-Z0-9_]*")
# Its loaders that differ in speed alone.
_FAST_LOADERS = ("hf", "fastsafetensors", "instanttensor", "runai_streamer")
_COUNTS = ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "kv_cache_memory_bytes")

_FORMER_TASKS = {"embedding": "embed", "encode": "pooling"}

_warned: set[str] = set()


def resolve_engine_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn vLLM's engine arguments into those of ``EngineConfig``.

    None is the default of every argument.

    Raises:
        TypeError: If vLLM has no such argument either, with the most similar name.
        ValueError: If an argument asks for what would change results and is not there.
    """
    fields = {}
    foreign = {}
    for name, value in arguments.items():
        if name in FIELD_NAMES:
            fields[name] = value
        elif name in ROW_OF:
            foreign[name] = value
        else:
            hint = did_you_mean(name, (*FIELD_NAMES, *ROW_OF))
            raise TypeError(f"there is no engine argument {name!r}{hint}")
    for name, value in foreign.items():
        _take(ROW_OF[name], value, fields)
    return _spelt_as_ours({name: value for name, value in fields.items() if value is not None})


def _take(row: Row, value: Any, fields: dict[str, Any]) -> None:
    if not row.is_asked_for(value):
        return
    if row.kind == "translated":
        _TRANSLATIONS[row.name](row, value, fields)
    elif row.kind == "refused":
        raise ValueError(f"{row.name}={value!r:.200} is not supported: {row.note}")
    elif row.name not in _warned:
        _warned.add(row.name)
        logger.warning("%s=%.200r makes no difference: %s", row.name, value, row.note)


def _refuse(row: Row, value: Any, fields: dict[str, Any]) -> None:
    raise ValueError(f"{row.name}={value!r:.200} is not supported: {row.note}")


def _take_runner(row: Row, value: Any, fields: dict[str, Any]) -> None:
    if value not in ("generate", "pooling"):
        raise ValueError(f"{row.name}={value!r:.200} is not supported: use generate or pooling")
    if fields.get("task") in (None, "auto"):  # which says more
        fields["task"] = value


def _take_override_pooler_config(row: Row, value: Any, fields: dict[str, Any]) -> None:
    fields["pooler_config"] = fields.get("pooler_config") or value


def _take_override(row: Row, value: Any, fields: dict[str, Any]) -> None:
    overrides = fields.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping):
        raise ValueError(f"{row.name} and an hf_overrides that is a function exclude each other")
    fields["hf_overrides"] = {**overrides, row.name: value}


def _take_structured_outputs_config(row: Row, value: Any, fields: dict[str, Any]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{row.name} must be a mapping, got {value!r:.200}")
    for name in ("disable_any_whitespace", "disable_additional_properties"):
        if value.get(name):
            raise ValueError(
                f"{row.name} sets {name} for all requests, which is not supported: set it in each "
                "request's StructuredOutputsParams"
            )
    if value.get("reasoning_parser"):
        fields["reasoning_parser"] = fields.get("reasoning_parser") or value["reasoning_parser"]


def _take_profiler_config(row: Row, value: Any, fields: dict[str, Any]) -> None:
    directory = value.get("torch_profiler_dir") if isinstance(value, Mapping) else None
    if not directory:
        raise ValueError(f"{row.name} must name a 'torch_profiler_dir', got {value!r:.200}")
    fields["profiler_dir"] = fields.get("profiler_dir") or directory


def _take_token(row: Row, value: Any, fields: dict[str, Any]) -> None:
    if value is not True:  # which is what the hub's library does anyway
        raise ValueError(
            "hf_token is not taken as an argument, so that it stands in no script: set the "
            "environment variable HF_TOKEN, or run `hf auth login`"
        )


_TRANSLATIONS = {
    "runner": _take_runner,
    "convert": _refuse,
    "override_pooler_config": _take_override_pooler_config,
    "rope_scaling": _take_override,
    "rope_theta": _take_override,
    "structured_outputs_config": _take_structured_outputs_config,
    "profiler_config": _take_profiler_config,
    "hf_token": _take_token,
}


def _spelt_as_ours(fields: dict[str, Any]) -> dict[str, Any]:
    """Bring values in vLLM's spelling into ours."""
    if "dtype" in fields:
        fields["dtype"] = dtype_name(fields["dtype"])
    for name in _COUNTS:
        if name in fields:
            fields[name] = whole_number(fields[name], name)
    if fields.get("max_model_len") in (-1, "auto"):
        del fields["max_model_len"]  # the model's length, and what outgrows the cache is refused
    backend = fields.get("attention_backend")
    backend = getattr(backend, "name", backend)  # an enum
    if isinstance(backend, str) and _BACKENDS_OF_VLLM.fullmatch(backend.upper()):
        row = Row("attention_backend", None, "ignored", "kernels are Pallas' and XLA's")
        _take(row, backend, fields)
        del fields["attention_backend"]
    if fields.get("task") in _FORMER_TASKS:
        fields["task"] = _FORMER_TASKS[fields["task"]]
    if "pooler_config" in fields:
        fields["pooler_config"] = _as_mapping(fields["pooler_config"], "pooler_config")
    if fields.get("load_format") in _FAST_LOADERS:
        fields["load_format"] = "auto"
    if fields.get("reasoning_parser") == "":
        del fields["reasoning_parser"]
    return _with_own_executor(fields)


def _as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A mapping, or the fields of one of vLLM's config objects, without those that are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {value!r:.200}")
    return {str(key): each for key, each in value.items() if each is not None}


def _with_own_executor(fields: dict[str, Any]) -> dict[str, Any]:
    backend = fields.get("distributed_executor_backend")
    if backend not in ("mp", "uni", "external_launcher"):
        return fields
    size = fields.get("tensor_parallel_size", 1) * fields.get("pipeline_parallel_size", 1)
    if backend == "external_launcher" and size > 1:
        raise ValueError(
            f"distributed_executor_backend='external_launcher' with {size} devices is not "
            "supported: leave it out, and let one process use all its devices"
        )
    del fields["distributed_executor_backend"]  # what a single process does anyway
    return fields


def dtype_name(dtype: Any) -> Any:
    """Return the name of a dtype of torch, numpy or jax; anything else stays, to be refused."""
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    if isinstance(dtype, type) or hasattr(dtype, "__name__"):  # numpy.float32, jax.numpy.float32
        return getattr(dtype, "__name__", dtype)
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def whole_number(value: Any, name: str = "value") -> Any:
    """Read an integer with an optional suffix (32k is 32000, 32K is 32768); "auto" stays.

    Raises:
        ValueError: If it is a text that is no such number.
    """
    if not isinstance(value, str) or value == "auto":
        return value
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", value.strip())
    if match is None:
        raise ValueError(f"{name} is {value!r}: give an integer such as 4096, 32k or 32K")
    number = float(match[1]) * SUFFIXES[match[2]] if match[2] else int(float(match[1]))
    if number != int(number) or ("." in match[1] and not match[2]):
        raise ValueError(f"{name} is {value!r}, which is not a whole number")
    return int(number)
