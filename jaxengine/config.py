"""How the engine runs a model: EngineConfig, every flag. Standard library only.

The scheduler and its tests never import jax.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Every engine argument, in vLLM's spelling; None means: decided from model and device.

    Attributes:
        model: Hub name, HF directory, GGUF file or converted directory.
        tokenizer: The same choice for the tokenizer; None takes the model's.
        revision: Branch, tag or commit of a hub model; None is its main branch.
        tokenizer_revision: The same for the tokenizer, if that is named.
        dtype: auto, bfloat16, float16 or float32; auto is what the checkpoint stores on a GPU
            (bfloat16 for float32 and GGUF) and float32 on a CPU.
        seed: Base of the random streams of requests that bring no seed.
        max_model_len: Longest sequence (prompt and output), in tokens.
        block_size: Tokens a KV block holds.
        gpu_memory_utilization: Share of the device's memory that the engine may use.
        kv_cache_memory_bytes: Size of the KV cache, instead of what memory allows.
        num_gpu_blocks_override: Number of KV blocks, instead of what memory allows.
        max_num_seqs: Most requests that run at the same time.
        max_num_batched_tokens: Most tokens computed in one step.
        enable_prefix_caching: Keep the blocks of finished requests for prompts that begin alike.
        enable_chunked_prefill: Compute a long prompt in several steps, beside other requests.
        long_prefill_token_threshold: Most tokens of one prompt in one step; 0 for no limit.
        scheduling_policy: fcfs, or priority (lowest number first).
        async_scheduling: Dispatch a step before the tokens of the last one are read.
        tensor_parallel_size: Devices that share each layer.
        pipeline_parallel_size: Groups of devices, each of which has some of the layers.
        data_parallel_size: Replicas of the model, each on its own devices, that share the requests.
        disable_custom_all_reduce: Add up over the devices of a layer with XLA's collectives alone.
        nnodes: Hosts whose devices one engine uses, each with a process of its own.
        node_rank: Number of this process, 0 for the one that holds the LLM.
        master_addr: Address of process 0, reachable from the others.
        master_port: Its port for jax; the next one up is the engine's own.
        distributed_executor_backend: ray starts the processes of the other hosts; None: you do.
        distributed_timeout_seconds: How long the processes wait for each other at the start.
        enforce_eager: Compile shapes when they are first needed instead of at start.
        load_format: auto, safetensors, pt, gguf, or dummy (random weights).
        attention_backend: reference, xla, triton or mosaic; None takes the best one.
        hf_overrides: Fields that replace those of config.json, nested ones as "a.b"; or a
            function of it.
        generation_config: auto (the model's defaults), vllm (neutral defaults), or a directory with
            the generation_config.json to take them from.
        override_generation_config: Fields that replace those of generation_config.json.
        chat_template: Jinja template, or a file with one, in place of the model's.
        max_logprobs: Most log-probabilities that a request may ask for per token; -1 for all.
        logprobs_mode: raw_logprobs, processed_logprobs (behind bias, penalties, temperature and
            truncation), raw_logits or processed_logits.
        profiler_dir: Where start_profile writes its traces.
        reasoning_parser: How the model marks its reasoning: deepseek_r1, qwen3, gpt_oss or think;
            empty if it does not reason. Grammars of structured outputs apply behind it.
        task: auto, generate, pooling, embed, classify, score or reward; what the model cannot do is
            an error at the start.
        pooler_config: Of an embedding, in place of what the model says: pooling_type (cls, mean,
            last, max), normalize.
        skip_tokenizer_init: Take and return token ids only.
        trust_remote_code: Refused: code from a checkpoint is never run.
        disable_log_stats: Print neither progress bars nor the report of the start.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    async_scheduling: bool = True
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    disable_custom_all_reduce: bool = False
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29501
    distributed_executor_backend: str | None = None
    distributed_timeout_seconds: int = 300
    enforce_eager: bool = False
    load_format: str = "auto"
    attention_backend: str | None = None
    hf_overrides: Mapping[str, Any] | Callable | None = dataclasses.field(default=None, hash=False)
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, hash=False
    )
    chat_template: str | None = None
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    profiler_dir: str = "jaxengine-profile"
    reasoning_parser: str = ""
    task: str = "auto"
    pooler_config: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the model or the device."""
        if self.trust_remote_code:
            raise ValueError(
                "trust_remote_code=True is refused: jaxengine never runs code from a checkpoint. "
                "Leave it out; if the model needs its own class, register it with "
                "jaxengine.ModelRegistry"
            )
        _check_range("gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 1.0)
        if self.block_size % 8 or not 8 <= self.block_size <= 256:
            raise ValueError(
                f"block_size {self.block_size} is not a multiple of 8 between 8 and 256: use 16"
            )
        for name in (
            "max_model_len",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
            "max_num_seqs",
            "max_num_batched_tokens",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None and not _is_integer(value, 1):
                raise ValueError(f"{name} is {value!r}: a positive integer is needed")
        for name, lowest in (
            ("seed", -(2**63)),
            ("max_logprobs", -1),
            ("long_prefill_token_threshold", 0),
        ):
            value = getattr(self, name)
            if not _is_integer(value, lowest):
                raise ValueError(
                    f"{name} is {value!r}: an integer of 64 bits from {lowest} on is needed"
                )
        self._check_hosts()
        _check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("task", self.task, TASKS)
        _check_choice("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)

    def _check_hosts(self) -> None:
        for name in ("nnodes", "distributed_timeout_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: a positive integer is needed")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"node_rank {self.node_rank} is not one of {self.nnodes} nodes: use 0 to "
                f"{self.nnodes - 1}, a different one on each host, or raise nnodes"
            )
        if not 1 <= self.master_port <= 65534:
            raise ValueError(
                f"master_port is {self.master_port}: it and the next one are used, so it must lie "
                "between 1 and 65534"
            )
        backends = (None, "ray")
        _check_choice("distributed_executor_backend", self.distributed_executor_backend, backends)


LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "converted", "dummy")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
TASKS = ("auto", "generate", "pooling", "embed", "classify", "score", "reward")
ATTENTION_BACKENDS = (None, "reference", "xla", "triton", "mosaic")


def _is_integer(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < 2**63


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: it must lie between {low} and {high}")


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}: use one of {known}")
