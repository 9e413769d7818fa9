"""Tiny shapes of mixtures of experts, one for each option in use, and sizes that were published."""

from typing import Any

QWEN2 = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
QWEN3 = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "head_dim": 16,
    "norm_topk_prob": True,
}
OLMOE = {"num_experts": 8, "num_experts_per_tok": 3}
PHIMOE = {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}
FACTORS = [1.0, 1.5, 2.0, 3.0]
# transformers' class takes the short factors for long texts too (the published code does not), but
# the right one of the two that multiply cosines and sines: so both lists are the same here.
PHIMOE_ROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
GRANITE = {
    "num_local_experts": 4,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 20,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}

# Five experts are more than two devices can share, so each is cut; the others are dealt out.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral with a window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 20}),
    "qwen2_moe": ("Qwen2Moe", QWEN2),
    "qwen2_moe, normalised, some layers plain": (
        "Qwen2Moe",
        {**QWEN2, "norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN3),
    "qwen3_moe, every other layer, not normalised": (
        "Qwen3Moe",
        {**QWEN3, "decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True},
    ),
    "olmoe": ("Olmoe", {**OLMOE, "clip_qkv": 1.0}),
    "olmoe, normalised": ("Olmoe", {**OLMOE, "norm_topk_prob": True}),
    "phimoe": ("Phimoe", PHIMOE),
    "phimoe of long texts": ("Phimoe", {**PHIMOE, "rope_parameters": PHIMOE_ROPE}),
    "phimoe of short texts": (
        "Phimoe",
        {**PHIMOE, "rope_parameters": {**PHIMOE_ROPE, "original_max_position_embeddings": 128}},
    ),
    "granitemoe": ("GraniteMoe", GRANITE),
    "granitemoeshared": ("GraniteMoeShared", {**GRANITE, "shared_intermediate_size": 24}),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss with a low limit": ("GptOss", {**GPT_OSS, "swiglu_limit": 0.5, "swiglu_alpha": 1.5}),
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": ("Mixtral", {}),
    "Qwen1.5-MoE-A2.7B": ("Qwen2Moe", {}),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True},
    ),
    "OLMoE-1B-7B": ("Olmoe", {}),
    "Phi-3.5-MoE": ("Phimoe", {"attention_bias": True, "lm_head_bias": True}),
    "granite-3.1-1b-a400m": (
        "GraniteMoe",
        {
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "vocab_size": 49155,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-oss-20b in bfloat16": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
}
