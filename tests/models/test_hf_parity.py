"""Every family equals HF transformers in float32, on tiny random checkpoints, at every position."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
