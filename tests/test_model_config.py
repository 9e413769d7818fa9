from typing import Any

import pytest

from jaxengine.model_config import ModelConfig, resolve_dtype

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
    assert (config.head_dim, config.intermediate_size, config.dtype) == (128, 14336, "bfloat16")
    assert config.eos_token_ids == (128001, 128008)
    assert config.sliding_windows == (None,) * 4
    assert config.hf_config["torch_dtype"] == "bfloat16"


def test_configs_can_be_keys() -> None:
    assert hash(ModelConfig.from_hf(LLAMA)) == hash(ModelConfig.from_hf(LLAMA))


@pytest.mark.parametrize(
    ("windows", "uniform"),
    [((None,) * 4, None), ((64,) * 4, 64), ((64, None, 64, None), None)],
)
def test_a_window_is_uniform_only_where_every_layer_has_it(
    windows: tuple[int | None, ...], uniform: int | None
) -> None:
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    config = ModelConfig.from_hf({**LLAMA, **qwen, "sliding_window": 64, "layer_types": kinds})
    assert config.sliding_windows == windows
    assert config.uniform_sliding_window == uniform


@pytest.mark.parametrize("eos_token_id", ["</s>", [1, "2"], 2.5, True])
def test_end_tokens_that_are_no_integers_are_refused(eos_token_id: Any) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id=.* token ids are integers"):
        ModelConfig.from_hf({**LLAMA, "eos_token_id": eos_token_id})


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
