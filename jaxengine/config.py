"""What a model is (ModelConfig, from HF's config.json) and how the engine runs it (EngineConfig).

HF names are translated here, once; no other module reads them. Standard library only, so that
the scheduler and its tests never import jax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

DTYPES = ("bfloat16", "float16", "float32")

# Other spellings of ``dtype`` that users of vLLM type.
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding as HF's ``rope_parameters`` (``rope_scaling`` before v5) has it.

    Attributes:
        rope_type: default, linear, dynamic, llama3 or yarn.
        theta: Base of the frequencies.
        rotary_fraction: Share of ``head_dim`` that is rotated.
        parameters: The remaining HF fields of that type (``factor``, ...).
    """

    rope_type: str = "default"
    theta: float = 10000.0
    rotary_fraction: float = 1.0
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "RopeConfig":
        """Read the rope fields of an HF config, in the spelling of any transformers release."""
        parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
        parameters.pop("type", None)
        theta = parameters.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        fraction = parameters.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor")
        return cls(rope_type, float(theta), float(fraction or 1.0), parameters)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the field's names.

    Attributes:
        sliding_windows: One entry a layer: the window in tokens, or None for full attention.
        max_position_embeddings: The longest sequence that the checkpoint was made for.
        dtype: Type of weights and activations.
        hf_config: The whole config.json, for what only one family has.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    hf_config: Mapping[str, Any] = dataclasses.field(hash=False, repr=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], dtype: str = "auto") -> "ModelConfig":
        """Translate the content of an HF ``config.json``.

        Raises:
            ValueError: If a field that the shape needs is missing or does not divide.
        """
        architectures = hf.get("architectures") or []
        if not architectures:
            raise ValueError("config.json names no architecture: add an 'architectures' list to it")
        num_heads = _required(hf, "num_attention_heads")
        hidden_size = _required(hf, "hidden_size")
        num_kv_heads = hf.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}: config.json is damaged"
            )
        num_layers = _required(hf, "num_hidden_layers")
        return cls(
            architecture=architectures[0],
            vocab_size=_required(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(hf, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=hf.get("head_dim") or hidden_size // num_heads,
            max_position_embeddings=_required(hf, "max_position_embeddings"),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            hidden_act=hf.get("hidden_act", "silu"),
            rope=RopeConfig.from_hf(hf),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            sliding_windows=_sliding_windows(hf, num_layers),
            dtype=resolve_dtype(dtype, hf.get("dtype") or hf.get("torch_dtype")),
            eos_token_ids=_as_ids(hf.get("eos_token_id")),
            hf_config=dict(hf),
        )

    @property
    def uniform_sliding_window(self) -> int | None:
        """The window that every layer has; None if any layer sees everything."""
        windows = set(self.sliding_windows)
        return windows.pop() if len(windows) == 1 else None


def _required(hf: Mapping[str, Any], name: str) -> int:
    value = hf.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json has {name}={value!r}: a positive integer is needed")
    return value


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _sliding_windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = hf.get("sliding_window")
    if not window or hf.get("use_sliding_window") is False:
        return (None,) * num_layers
    if layer_types := hf.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if "max_window_layers" in hf:  # Qwen: only the layers from this one on have the window
        first = hf["max_window_layers"]
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return (window,) * num_layers


def resolve_dtype(requested: str, stored: str | None) -> str:
    """Choose the compute dtype: what was asked for, or for ``auto`` what the checkpoint stores.

    ``auto`` keeps bfloat16, float16 and float32 as they are stored.

    Raises:
        ValueError: If the dtype is not one of ``DTYPES``.
    """
    wanted = str(stored or "bfloat16").removeprefix("torch.") if requested == "auto" else requested
    wanted = _DTYPE_ALIASES.get(wanted, wanted)
    if wanted not in DTYPES:
        raise ValueError(f"dtype {wanted!r} is not supported: use one of auto, {', '.join(DTYPES)}")
    return wanted


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Every engine argument, in vLLM's spelling; None means: decided from model and device.

    Attributes:
        model: Hub name, HF directory, GGUF file or converted directory.
        tokenizer: The same choice for the tokenizer; None takes the model's.
        revision: Branch, tag or commit of a hub model; None is its main branch.
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
        hf_overrides: Fields that replace those of config.json.
        generation_config: auto (the model's defaults) or vllm (neutral defaults).
        max_logprobs: Most log-probabilities that a request may ask for per token; -1 for all.
        reasoning_parser: How the model marks its reasoning: deepseek_r1, qwen3, gpt_oss or think;
            empty if it does not reason. Grammars of structured outputs apply behind it.
        skip_tokenizer_init: Take and return token ids only.
        trust_remote_code: Refused: code from a checkpoint is never run.
        disable_log_stats: Print neither progress bars nor the report of the start.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
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
    hf_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    generation_config: str = "auto"
    max_logprobs: int = 20
    reasoning_parser: str = ""
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
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}: a positive integer is needed")
        self._check_hosts()
        _check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("generation_config", self.generation_config, ("auto", "vllm"))

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
ATTENTION_BACKENDS = (None, "reference", "xla", "triton", "mosaic")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: it must lie between {low} and {high}")


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}: use one of {known}")
