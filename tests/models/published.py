"""Sizes that were published of families that transformers has a class for.

What is not said is the default of the class, which is most often the size that it was written for.
"""

from typing import Any

from tests.models import mixture_cases

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "starcoder": (
        "GPTBigCode",
        {"n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576, "n_positions": 8192,
         "vocab_size": 49152},
    ),
    "gpt2": ("GPT2", {}),
    "gpt-j-6b": ("GPTJ", {}),
    "gpt-neo-1.3B": ("GPTNeo", {"attention_types": [[["global", "local"], 12]]}),
    "gpt-neox-20b": ("GPTNeoX", {}),
    "opt-350m": (
        "OPT",
        {"hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096, "num_attention_heads": 16,
         "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    ),
    "opt-66b": (
        "OPT",
        {"hidden_size": 9216, "num_hidden_layers": 64, "ffn_dim": 36864,
         "num_attention_heads": 72, "word_embed_proj_dim": 9216},
    ),
    "bloom-7b1": ("Bloom", {"hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    "mpt-7b": (
        "Mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}
    ),
    "phi-2": (
        "Phi",
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
         "num_attention_heads": 32},
    ),
    "Phi-3-mini-4k-instruct": ("Phi3", {}),
    "stablelm-2-12b": (
        "StableLm",
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_key_value_heads": 8, "vocab_size": 100352, "qk_layernorm": True,
         "use_parallel_residual": True},
    ),
    "stablelm-3b-4e1t": ("StableLm", {}),
    "starcoder2-7b": (
        "Starcoder2",
        {"hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32,
         "num_attention_heads": 36, "num_key_value_heads": 4},
    ),
    "granite-3.1-8b": (
        "Granite",
        {"hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40,
         "num_key_value_heads": 8, "vocab_size": 49155, "tie_word_embeddings": True},
    ),
    "OLMo-7B-hf": ("Olmo", {}),
    "OLMo-2-1124-7B": ("Olmo2", {"vocab_size": 100352}),
    "Olmo-3-7B": ("Olmo3", {"vocab_size": 100278}),
    "SmolLM3-3B": ("SmolLM3", {}),
    "glm-4-9b-hf": ("Glm", {}),
    "GLM-4-9B-0414": ("Glm4", {}),
    "c4ai-command-r-v01": ("Cohere", {}),
    "c4ai-command-r-plus": (
        "Cohere",
        {"hidden_size": 12288, "intermediate_size": 33792, "num_hidden_layers": 64,
         "num_attention_heads": 96, "num_key_value_heads": 8, "use_qk_norm": True},
    ),
    "c4ai-command-r7b": (
        "Cohere2",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "nemotron-3-8b": (
        "Nemotron",
        {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "EXAONE-4.0-32B": (
        "Exaone4",
        {"hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 64,
         "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "persimmon-8b": ("Persimmon", {}),
    "AFM-4.5B": (
        "Arcee",
        {"hidden_size": 2560, "intermediate_size": 18432, "num_hidden_layers": 36,
         "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
         "vocab_size": 128004},
    ),
    "Seed-OSS-36B": (
        "SeedOss",
        {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
         "num_attention_heads": 80, "vocab_size": 155136},
    ),
    "ERNIE-4.5-0.3B-PT": ("Ernie4_5", {}),
    "helium-1-preview-2b": ("Helium", {}),
    "Ministral-8B-Instruct-2410": (
        "Ministral",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "head_dim": 128, "vocab_size": 131072,
         "sliding_window": 32768},
    ),
    "Ministral-3-8B": ("Ministral3", {}),
    "cwm": ("Cwm", {}),
    "Hunyuan-7B-Instruct": (
        "HunYuanDenseV1",
        {"intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Llama-3.1-8B": (
        "Llama",
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "Mistral-7B-v0.1": ("Mistral", {}),
    "Qwen2.5-7B": (
        "Qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    ),
    "Qwen3-8B": (
        "Qwen3",
        {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
    ),
    "gemma-7b": ("Gemma", {}),
    "gemma-2-2b": ("Gemma2", {}),
    "gemma-3-1b": (
        "Gemma3Text",
        {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
         "num_key_value_heads": 1, "vocab_size": 262144},
    ),
    "falcon-7b": ("Falcon", {}),
    "falcon-40b": (
        "Falcon",
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
         "num_kv_heads": 8, "new_decoder_architecture": True},
    ),
    **mixture_cases.PUBLISHED,
}  # fmt: skip
