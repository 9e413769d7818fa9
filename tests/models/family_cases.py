"""Tiny shapes of every family that transformers has a class for, one for each option in use."""

from typing import Any

from tests.models.mixture_cases import MIXTURES

NO_GQA = {"num_key_value_heads": 4}
# Where a case leaves something out, ``tests.helpers.TINY`` has it.
GPT_NEO = {
    "num_heads": 4,
    "num_layers": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 20,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}
GLM = {"head_dim": 16}
SHORT, LONG = [1.0, 1.5, 2.0, 3.0], [1.0, 2.0, 5.0, 9.0]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3 = {"pad_token_id": 0, "sliding_window": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
OLMO3 = {"num_hidden_layers": 4, "sliding_window": 20, "num_key_value_heads": 2}
GRANITE = {
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
}

# The first case of a family runs by default; the others are the options of its checkpoints.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_bigcode": ("GPTBigCode", {"n_inner": 48}),
    "gpt_bigcode with a key a query": ("GPTBigCode", {"multi_query": False}),
    "gptj": ("GPTJ", {"rotary_dim": 4, "n_inner": 48}),
    "gptj with all of a head rotated": ("GPTJ", {"rotary_dim": 8}),
    "gpt_neo": ("GPTNeo", {**GPT_NEO, "num_hidden_layers": 4}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "gpt_neox, sequential, all rotated": (
        "GPTNeoX",
        {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "opt": ("OPT", OPT),
    "opt 350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt without final norm": ("OPT", {**OPT, "_remove_final_layer_norm": True}),
    "galactica": (
        "OPT",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
    ),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "bloom with heads that are no power of two": ("Bloom", {"n_head": 6, "hidden_size": 48}),
    "mpt": ("Mpt", {**MPT, "attn_config": {"clip_qkv": 1.0}}),
    "mpt with heads that are no power of two": (
        "Mpt",
        {**MPT, "n_heads": 6, "d_model": 48, "attn_config": {"softmax_scale": 0.3}},
    ),
    "phi3": ("Phi3", PHI3),
    "phi3 with a window": ("Phi3", {**PHI3, "sliding_window": 20}),
    "phi3 of short texts": (
        "Phi3",
        {**PHI3, "rope_scaling": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "phi3 of long texts": (
        "Phi3",
        {**PHI3, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "phi4 mini": ("Phi3", {**PHI3, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "stablelm 12b": (
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.25},
    ),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": 20}),
    "starcoder2 untied, without biases": (
        "Starcoder2",
        {"use_bias": False, "tie_word_embeddings": False},
    ),
    "granite": ("Granite", GRANITE),
    "granite with biases": ("Granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "olmo": ("Olmo", {"clip_qkv": 1.0}),
    "olmo tied": ("Olmo", {"tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", OLMO3),
    "olmo3 scaled": (
        "Olmo3",
        {
            **OLMO3,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "smollm3 with windows": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 20},
    ),
    "glm": ("Glm", GLM),
    "glm4": ("Glm4", GLM),
    "cohere with head norms": ("Cohere", {"use_qk_norm": True}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 20}),
    "nemotron": ("Nemotron", {}),
    "nemotron with its own head_dim": ("Nemotron", {"head_dim": 24}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 4, "sliding_window": 20}),
    "exaone4 1.2b": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "persimmon": ("Persimmon", {}),
    "persimmon without head norms": ("Persimmon", {"qk_layernorm": False}),
    "arcee": ("Arcee", {"head_dim": 8}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "ernie": ("Ernie4_5", {"head_dim": 16}),
    "ernie with biases": ("Ernie4_5", {"head_dim": 8, "use_bias": True}),
    "helium": ("Helium", {"head_dim": 8}),
    "ministral": (
        "Ministral",
        {
            "head_dim": 8,
            "sliding_window": 20,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        },
    ),
    "ministral3": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1,
                                             "original_max_position_embeddings": 128}},
    ),
    "cwm": ("Cwm", {"head_dim": 8, "sliding_window": 20, "num_hidden_layers": 4}),
    "hunyuan": (
        "HunYuanDenseV1",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "alpha": 50.0,
                "factor": 1.0,
            },
        },
    ),
    "hunyuan unscaled": ("HunYuanDenseV1", {"head_dim": 8, "tie_word_embeddings": True}),
    **MIXTURES,
}  # fmt: skip
