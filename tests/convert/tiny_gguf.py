"""Tiny GGUF files, written as llama.cpp's converter writes them."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.convert.tiny import state

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    parts = name.removeprefix("model.layers.").split(".")
    if parts[0].isdigit():
        return f"blk.{parts[0]}.{GGUF_NAMES['.'.join(parts[1:-1])]}.{parts[-1]}"
    return f"{GGUF_NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order for q and k (its convert_hf_to_gguf.py, LlamaModel.permute)."""
    heads = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return heads.swapaxes(1, 2).reshape(values.shape)


def write_model(
    path: Path,
    model: Any,
    architecture: str,
    biases: dict[str, np.ndarray] | None = None,
    **metadata: Any,
) -> Path:
    """Write an HF model as an unquantised GGUF file without tokenizer.

    Args:
        path: The file to write.
        model: A model of transformers.
        architecture: GGUF's name for it.
        biases: Further tensors, by GGUF's names.
        metadata: Method of the writer without its ``add_`` -> value, also of keys that are
            written anyway.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10000.0,
    }
    for key, value in {**keys, **metadata}.items():
        getattr(writer, f"add_{key}")(value)
    for name, values in (biases or {}).items():
        writer.add_tensor(name, values)
    for name, values in state(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and "q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def demo_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF; skips the test where it is not there."""
    root = Path(__file__).resolve().parents[2]
    found = os.environ.get("JAXENGINE_DEMO_MODEL") or next(root.glob(".models/**/*.gguf"), None)
    if found is None:
        pytest.skip("no demo model: run `make test`, or set JAXENGINE_DEMO_MODEL to its .gguf file")
    return Path(found)
