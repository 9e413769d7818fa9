"""Configurations of families without a class in transformers: tiny ones, and published ones."""

from typing import Any

LLAMA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GQA = {"num_key_value_heads": 2}
CHATGLM: dict[str, Any] = {
    "padded_vocab_size": 128,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "num_layers": 2,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
}
ALIBI = {k: v for k, v in LLAMA.items() if k != "max_position_embeddings"} | {
    "model_max_length": 256
}
QWEN: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 256,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_logn_attn": True,
    "use_dynamic_ntk": True,
    "tie_word_embeddings": False,
}
EXAONE: dict[str, Any] = {
    **{k: v for k, v in LLAMA.items() if k not in ("num_hidden_layers", "rms_norm_eps")},
    **GQA,
    "num_layers": 2,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "silu",
}
TELECHAT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "n_layer": 2,
    "n_head": 4,
    "seq_length": 256,
    "layer_norm_epsilon": 1e-5,
}
MINICPM = {
    **LLAMA,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
    "tie_word_embeddings": True,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "aquila": ("AquilaForCausalLM", {**LLAMA, **GQA}),
    "xverse": ("XverseForCausalLM", LLAMA),
    "yi": ("YiForCausalLM", {**LLAMA, **GQA}),
    "minicpm": ("MiniCPMForCausalLM", MINICPM),
    "orion": ("OrionForCausalLM", LLAMA),
    "internlm": ("InternLMForCausalLM", {**LLAMA, "bias": True}),
    "internlm2": ("InternLM2ForCausalLM", {**LLAMA, **GQA, "rope_theta": 1e6}),
    "internlm3": ("InternLM3ForCausalLM", {**LLAMA, **GQA, "qkv_bias": True, "bias": False}),
    "chatglm2": ("ChatGLMModel", CHATGLM),
    "chatglm3 32k": ("ChatGLMModel", {**CHATGLM, "rope_ratio": 50}),
    "baichuan 7b": ("BaichuanForCausalLM", LLAMA),
    "baichuan 13b": ("BaichuanForCausalLM", ALIBI),
    "baichuan2 7b": ("BaichuanForCausalLM", {**LLAMA, "z_loss_weight": 0}),
    "baichuan2 13b": ("BaichuanForCausalLM", {**ALIBI, "z_loss_weight": 0}),
    "qwen": ("QWenLMHeadModel", QWEN),
    "exaone": ("ExaoneForCausalLM", EXAONE),
    "telechat2": ("TeleChat2ForCausalLM", TELECHAT),
}

# As the models of these names were published.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Aquila-7B": (
        "AquilaForCausalLM",
        {
            **LLAMA,
            "vocab_size": 100008,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "XVERSE-13B": (
        "XverseForCausalLM",
        {
            **LLAMA,
            "vocab_size": 100278,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "MiniCPM-2B": (
        "MiniCPMForCausalLM",
        {
            **MINICPM,
            "vocab_size": 122753,
            "hidden_size": 2304,
            "intermediate_size": 5760,
            "num_hidden_layers": 40,
            "num_attention_heads": 36,
            "dim_model_base": 256,
        },
    ),
    "Orion-14B": (
        "OrionForCausalLM",
        {
            **LLAMA,
            "vocab_size": 84608,
            "hidden_size": 5120,
            "intermediate_size": 15360,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "internlm-7b": (
        "InternLMForCausalLM",
        {
            **LLAMA,
            "bias": True,
            "vocab_size": 103168,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "internlm2-7b": (
        "InternLM2ForCausalLM",
        {
            **LLAMA,
            "rope_theta": 1e6,
            "vocab_size": 92544,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "chatglm2-6b": (
        "ChatGLMModel",
        {
            **CHATGLM,
            "padded_vocab_size": 65024,
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "kv_channels": 128,
            "num_attention_heads": 32,
            "num_layers": 28,
            "seq_length": 32768,
        },
    ),
    "Baichuan-13B": (
        "BaichuanForCausalLM",
        {
            **ALIBI,
            "model_max_length": 4096,
            "vocab_size": 64000,
            "hidden_size": 5120,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "Baichuan2-7B": (
        "BaichuanForCausalLM",
        {
            **LLAMA,
            "z_loss_weight": 0,
            "vocab_size": 125696,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "Qwen-7B": (
        "QWenLMHeadModel",
        {
            **QWEN,
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "kv_channels": 128,
            "seq_length": 8192,
        },
    ),
    "EXAONE-3.0-7.8B": (
        "ExaoneForCausalLM",
        {
            **EXAONE,
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "TeleChat-7B": (
        "TeleChat2ForCausalLM",
        {
            **TELECHAT,
            "vocab_size": 160256,
            "hidden_size": 4096,
            "ffn_hidden_size": 12288,
            "n_layer": 30,
            "n_head": 32,
            "seq_length": 8192,
        },
    ),
}
