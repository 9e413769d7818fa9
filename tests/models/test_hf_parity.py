"""Every family equals HF transformers in float32, on tiny random checkpoints, at every position."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.helpers import hf_logits, our_logits, save_tiny_model

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 128, 90)]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

GPT2 = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 128,
    "activation_function": "gelu_new",
}
GEMMA2 = {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 24}
GEMMA3 = {**GEMMA2, "num_hidden_layers": 4, "sliding_window_pattern": 2}
FALCON = {"num_hidden_layers": 2, "ffn_hidden_size": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with more than ten layers": ("Llama", {"num_hidden_layers": 12}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with one KV head": ("Llama", {"num_key_value_heads": 1}),
    "llama with as many KV heads": ("Llama", {"num_key_value_heads": 4}),
    "llama with its own head_dim": ("Llama", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with a window in its upper layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied, scaled by layer": (
        "GPT2",
        {
            **GPT2,
            "tie_word_embeddings": False,
            "scale_attn_by_inverse_layer_idx": True,
            "n_inner": 40,
        },
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi with head norms": ("Phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2 without caps": (
        "Gemma2",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3 scaled": (
        "Gemma3Text",
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "falcon 7b": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon 40b": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 40b with one norm": (
        "Falcon",
        {
            **FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon rw with alibi": (
        "Falcon",
        {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "rope linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "rope llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "rope yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "rope yarn with its own attention factor": (
        "Llama",
        {"rope_parameters": {**YARN_ROPE, "attention_factor": 0.7, "truncate": False}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    model = save_tiny_model(tmp_path, family, **overrides)
    ours, theirs = our_logits(tmp_path, TOKENS), hf_logits(model, TOKENS)
    # Gemma's logits reach 10, and on some CPUs each side is 0.8e-4 from the exact ones, either way.
    with torch.no_grad():
        exact = model.double()(torch.tensor([TOKENS])).logits[0].numpy()
    rounding = np.abs(theirs - exact).max()
    assert np.abs(ours - theirs).max() < max(1e-4, 2 * rounding)


def test_deci_equals_a_llama_whose_kv_heads_are_repeated(tmp_path: Path) -> None:
    # transformers has no DeciLM: a KV head that serves several queries is a head given to each.
    counts = [2, 1, 4]
    model = save_tiny_model(tmp_path, "Llama", num_key_value_heads=4)
    with torch.no_grad():
        for layer, count in zip(model.model.layers, counts, strict=True):
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.view(4, 8, 32)[:: 4 // count]
                projection.weight.copy_(heads.repeat_interleave(4 // count, 0).reshape(32, 32))
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for i, count in enumerate(counts):
        for letter in "kv":
            name = f"model.layers.{i}.self_attn.{letter}_proj.weight"
            heads = tensors[name].reshape(4, 8, 32)[:: 4 // count]
            tensors[name] = np.ascontiguousarray(heads.reshape(-1, 32))
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["DeciLMForCausalLM"], "num_key_value_heads_per_layer": counts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    difference = our_logits(tmp_path, TOKENS) - hf_logits(model, TOKENS)
    assert np.abs(difference).max() < 1e-4


def test_deci_layers_may_lack_attention_or_feed_forward(tmp_path: Path) -> None:
    # A part that adds nothing is one whose output projection is zero.
    model = save_tiny_model(tmp_path, "Llama", intermediate_size=256)
    layers = model.model.layers
    with torch.no_grad():
        layers[0].self_attn.o_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.zero_()
    gone = ("layers.0.self_attn", "layers.0.input_layernorm", "layers.2.mlp", "layers.2.post")
    tensors = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in gone)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    attention, ffn = {"n_heads_in_group": 2}, {"ffn_mult": 12.0}  # 2/3 * 12 * 32 = 256
    blocks = [
        {"attention": {"no_op": True}, "ffn": ffn},
        {"attention": attention, "ffn": ffn},
        {"attention": attention, "ffn": {"no_op": True}},
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["DeciLMForCausalLM"], "block_configs": blocks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    difference = our_logits(tmp_path, TOKENS) - hf_logits(model, TOKENS)
    assert np.abs(difference).max() < 1e-4


def test_dynamic_rope_equals_transformers_at_the_served_length(tmp_path: Path) -> None:
    # transformers scales for the sequence at hand, we for max_model_len: equal where they meet.
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = save_tiny_model(tmp_path, "Llama", rope_parameters=rope, max_position_embeddings=40)
    ours = our_logits(tmp_path, TOKENS, max_model_len=len(TOKENS))
    assert np.abs(ours - hf_logits(model, TOKENS)).max() < 1e-4


def test_dynamic_rope_is_unscaled_within_the_models_own_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = save_tiny_model(tmp_path, "Llama", rope_parameters=rope, max_position_embeddings=90)
    ours = our_logits(tmp_path, TOKENS, max_model_len=90)
    assert np.abs(ours - hf_logits(model, TOKENS)).max() < 1e-4
