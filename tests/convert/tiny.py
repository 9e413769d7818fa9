"""Tiny random models of transformers, and the slow obvious way to rearrange their state dicts."""

from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")

SIZES = {
    "vocab_size": 56,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 6 * 16 is not hidden_size, so that o_proj is not square
    "max_position_embeddings": 64,
}


def make_model(family: str, **overrides: Any) -> Any:
    """A random HF model of a family in float32, norms and biases random too."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def save_model(directory: Path, family: str = "Llama", **overrides: Any) -> Any:
    """Save such a model as safetensors; return it."""
    model = make_model(family, **overrides)
    model.save_pretrained(directory)
    return model


def state(model: Any) -> dict[str, np.ndarray]:
    """The state dict as numpy arrays."""
    return {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


def expected_parameters(model: Any) -> dict[str, np.ndarray]:
    """Our tree made from the state dict with loops over heads."""
    tensors, config = state(model), model.config
    K = config.num_key_value_heads
    G = config.num_attention_heads // K
    H = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // (K * G)
    tree = {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        tree["lm_head.weight"] = tensors["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        hf, ours = f"model.layers.{i}", f"layers.{i}"
        attention = f"{hf}.self_attn"
        tree[f"{ours}.input_norm.weight"] = tensors[f"{hf}.input_layernorm.weight"]
        tree[f"{ours}.post_attention_norm.weight"] = tensors[
            f"{hf}.post_attention_layernorm.weight"
        ]
        for kind in ("weight", "bias"):
            if f"{attention}.q_proj.{kind}" in tensors:
                q, k, v = (tensors[f"{attention}.{name}_proj.{kind}"] for name in "qkv")
                groups = [
                    [q[(kv * G + g) * H : (kv * G + g + 1) * H] for g in range(G)]
                    + [k[kv * H : (kv + 1) * H], v[kv * H : (kv + 1) * H]]
                    for kv in range(K)
                ]
                tree[f"{ours}.attention.qkv_proj.{kind}"] = np.array(groups)
            if f"{hf}.mlp.gate_proj.{kind}" in tensors:
                pair = [tensors[f"{hf}.mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
                tree[f"{ours}.mlp.gate_up_proj.{kind}"] = np.array(pair)
                tree[f"{ours}.mlp.down_proj.{kind}"] = tensors[f"{hf}.mlp.down_proj.{kind}"]
        o_proj = tensors[f"{attention}.o_proj.weight"]
        tree[f"{ours}.attention.o_proj.weight"] = o_proj.reshape(len(o_proj), K * G, H)
        if f"{attention}.o_proj.bias" in tensors:
            tree[f"{ours}.attention.o_proj.bias"] = tensors[f"{attention}.o_proj.bias"]
        for name in ("q_norm", "k_norm"):
            if f"{attention}.{name}.weight" in tensors:
                tree[f"{ours}.attention.{name}.weight"] = tensors[f"{attention}.{name}.weight"]
    return tree


def assert_same_tree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal names, shapes and values."""
    assert sorted(found) == sorted(expected)
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, err_msg=path)
