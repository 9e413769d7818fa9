from typing import Any

import pytest

from jaxengine.config import EngineConfig, ModelConfig, RopeConfig, resolve_dtype

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "eos_token_id": [128001, 128008],
    "torch_dtype": "bfloat16",
}


def test_names_of_hugging_face_become_ours() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 32, 8)
    assert (config.head_dim, config.dtype, config.rms_norm_eps) == (128, "bfloat16", 1e-05)
    assert config.eos_token_ids == (128001, 128008)
    assert config.sliding_windows == (None,) * 4
    assert config.hf_config["torch_dtype"] == "bfloat16"


def test_what_a_config_may_leave_out_has_the_values_of_hugging_face() -> None:
    small = {name: LLAMA[name] for name in LLAMA if name not in ("num_key_value_heads",)}
    del small["rms_norm_eps"], small["rope_theta"], small["eos_token_id"], small["torch_dtype"]
    config = ModelConfig.from_hf(small)
    assert (config.num_kv_heads, config.rms_norm_eps, config.hidden_act) == (32, 1e-6, "silu")
    assert (config.rope, config.eos_token_ids) == (RopeConfig(), ())
    assert not config.tie_word_embeddings
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
    ],
)
def test_rope_is_read_in_the_spelling_of_any_transformers_release(spelling: dict) -> None:
    assert RopeConfig.from_hf(spelling) == RopeConfig("yarn", 5e5, 1.0, {"factor": 4.0})


def test_rope_keeps_the_rotated_share_of_a_head() -> None:
    assert RopeConfig.from_hf({"partial_rotary_factor": 0.5}).rotary_fraction == 0.5
    parameters = {"rope_type": "default", "partial_rotary_factor": 0.25}
    assert RopeConfig.from_hf({"rope_parameters": parameters}).rotary_fraction == 0.25


@pytest.mark.parametrize(
    ("fields", "windows", "uniform"),
    [
        ({}, (None,) * 4, None),
        ({"sliding_window": None}, (None,) * 4, None),
        ({"sliding_window": 64}, (64,) * 4, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, (None,) * 4, None),
        ({"sliding_window": 64, "max_window_layers": 3}, (None, None, None, 64), None),
        ({"sliding_window": 64, "max_window_layers": 0}, (64,) * 4, 64),
        (
            {
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (64, None, 64, None),
            None,
        ),
    ],
)
def test_each_layer_has_its_own_window(
    fields: dict[str, Any], windows: tuple, uniform: int | None
) -> None:
    config = ModelConfig.from_hf({**LLAMA, **fields})
    assert config.sliding_windows == windows
    assert config.uniform_sliding_window == uniform


@pytest.mark.parametrize(
    ("requested", "stored", "expected"),
    [
        ("auto", "float16", "float16"),
        ("auto", "torch.bfloat16", "bfloat16"),
        ("auto", None, "bfloat16"),
        ("half", "float32", "float16"),
        ("float", "float16", "float32"),
        ("bf16", None, "bfloat16"),
    ],
)
def test_dtypes_are_resolved(requested: str, stored: str | None, expected: str) -> None:
    assert resolve_dtype(requested, stored) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is refused"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5: .* 0.05 and 1.0"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0"),
        ({"block_size": 12}, "block_size 12 is not a multiple of 8 between 8 and 256: use 16"),
        ({"block_size": 512}, "block_size 512"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0: a positive integer is needed"),
        ({"max_model_len": 2.5}, "max_model_len is 2.5"),
        ({"max_num_batched_tokens": "8k"}, "max_num_batched_tokens is '8k'"),
        ({"tensor_parallel_size": -1}, "tensor_parallel_size is -1"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0: a positive integer"),
        ({"data_parallel_size": 1.5}, "data_parallel_size is 1.5: a positive integer is needed"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy is 'lifo': use one of fcfs, priority"),
        ({"load_format": "npz"}, "load_format is 'npz': use one of auto, safetensors"),
        ({"attention_backend": "flash"}, "attention_backend is 'flash': use one of None, ref"),
        ({"generation_config": "mine"}, "generation_config is 'mine': use one of auto, vllm"),
    ],
    ids=str,
)
def test_engine_arguments_out_of_bounds_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("model", **arguments)


def test_an_unknown_engine_argument_is_named() -> None:
    with pytest.raises(TypeError, match="max_number_of_seqs"):
        EngineConfig("model", max_number_of_seqs=3)  # type: ignore[call-arg]


def test_configs_cannot_be_changed_and_can_be_keys() -> None:
    config = EngineConfig("model", hf_overrides={"a": 1})
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    assert len({config, EngineConfig("model", hf_overrides={"a": 1})}) == 1
    assert hash(ModelConfig.from_hf(LLAMA)) == hash(ModelConfig.from_hf(LLAMA))
