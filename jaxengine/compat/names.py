"""vLLM's methods, fields and classes beside ours. Standard library only.

Names are those of vLLM 0.33. A status is "same", "differs" (with what is other), or "missing".
"""

import dataclasses
from typing import Literal

Status = Literal["same", "differs", "missing"]


@dataclasses.dataclass(frozen=True)
class Name:
    """A name of vLLM.

    Attributes:
        name: As vLLM spells it.
        status: Whether it is here.
        note: What is other, or what to use instead.
    """

    name: str
    status: Status = "same"
    note: str = ""


def _same(*names: str) -> list[Name]:
    return [Name(name) for name in names]


def _missing(note: str, *names: str) -> list[Name]:
    return [Name(name, "missing", note) for name in names]


METHODS = (
    *_same("generate", "chat", "enqueue", "wait_for_completion", "get_tokenizer", "get_world_size"),
    *_same("get_default_sampling_params", "from_engine_args", "llm_engine", "model_config"),
    Name("beam_search", "differs", "structured_outputs are refused; one priority for all prompts"),
    Name("get_metrics", "differs", "counters and gauges of the scheduler and of tokens"),
    Name("reset_prefix_cache", "differs", "never while requests run"),
    Name("start_profile", "differs", "a jax.profiler trace in profiler_dir"),
    *_same("stop_profile"),
    Name("sleep", "differs", "mode is 'abort'; level 2 loads the weights anew at wake_up"),
    Name("wake_up", "differs", "wakes everything, whatever tags are given"),
    Name("collective_rpc", "differs", "runs here, with each replica's ModelRunner"),
    Name("apply_model", "differs", "gets the flax module of each stage; its changes are lost"),
    *_missing("enqueue what chat templates write", "enqueue_chat"),
    *_same("embed", "classify", "score"),
    Name("encode", "differs", "data is a numpy array; pooling_task: embed, token_embed, classify"),
    *_missing("there are no reward models yet", "reward"),
    *_missing("sleep(1) gives all of it back", "release_kv_cache_memory"),
    *_missing("models here read text only", "reset_mm_cache"),
    Name("update_weights", "differs", "takes a tree, named arrays or a directory; all or some"),
    *_missing(
        "update_weights(...) takes arrays that this process has",
        *("init_weight_transfer_engine", "start_weight_update", "finish_weight_update"),
    ),
)
REQUEST_OUTPUT = (
    *_same("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"),
    *_same("num_cached_tokens"),
    Name("metrics", "differs", "always there; times are those of time.time"),
    Name("lora_request", "differs", "always None"),
    *_missing("models here read text only", "encoder_prompt", "encoder_prompt_token_ids"),
    *_missing("there is no such transfer", "kv_transfer_params"),
)
COMPLETION_OUTPUT = (
    *_same("index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason"),
    *_same("stop_reason"),
    Name("lora_request", "differs", "always None"),
    *_missing("experts are not returned", "routed_experts"),
)
CLASSES = (
    *_same("LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "TextPrompt"),
    *_same("TokensPrompt", "EngineArgs", "ModelRegistry"),
    Name("LLMEngine", "differs", "add_request, step, abort_request and what asks for its state"),
    *_same("AsyncLLMEngine", "AsyncEngineArgs"),
    Name("PoolingParams", "differs", "dimensions, use_activation and its former names"),
    *_same("PoolingOutput", "PoolingRequestOutput", "EmbeddingOutput", "EmbeddingRequestOutput"),
    *_same("ClassificationOutput", "ClassificationRequestOutput"),
    *_same("ScoringOutput", "ScoringRequestOutput"),
    *_missing("distributed_executor_backend='ray' starts Ray", "initialize_ray_cluster"),
)
# Defaults that are not vLLM's, of fields that both have.
OTHER_DEFAULTS = {
    "gpu_memory_utilization": "0.92 in vLLM",
    "max_num_seqs": "on a CPU 256, as in vLLM times its devices",
    "max_num_batched_tokens": "on a CPU 512: longer steps gain nothing there",
    "distributed_timeout_seconds": "None in vLLM",
    "disable_log_stats": "True in vLLM's LLM",
    "dtype": "auto serves float32 checkpoints as bfloat16 on a GPU (float16 in vLLM)",
}
# Fields of EngineConfig that are no arguments of vLLM.
OUR_OWN = ("profiler_dir", "task")
# What vLLM's SamplingParams has not, or has otherwise.
SAMPLING_NOTES = {
    "logprob_token_ids": "without ranks",
    "structured_outputs": "the backend is llguidance",
    "spaces_between_special_tokens": "fast tokenizers put none there",
    "guided_decoding": "former name of structured_outputs",
}
