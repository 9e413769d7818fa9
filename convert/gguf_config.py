"""The config.json that a GGUF file's metadata and tensors amount to."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gguf import Keys
from jaxengine.convert.errors import MAX_ELEMENTS, CheckpointError
from jaxengine.convert.gguf_file import GGUFFile, QuantisedTensor
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.gguf_rope import rope_config
from jaxengine.convert.gguf_special_tokens import generation_config

LLM, Attention = Keys.LLM, Keys.Attention

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

# Above what any published model has; a file beyond is damaged, or wants to exhaust memory.
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_WIDTH = 1 << 20
MAX_LENGTH = 1 << 28


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of a file.

    Raises:
        CheckpointError: If the model is not supported, or the metadata lacks a value or has one
            that makes no sense.
    """
    name = file.metadata.get(Keys.General.ARCHITECTURE)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path} holds a model of architecture {name!r:.80}, which is not supported as "
            f"GGUF; supported: {', '.join(ARCHITECTURES)}"
        )
    metadata = Metadata(file.path, file.metadata, name)
    num_layers = metadata.integer(LLM.BLOCK_COUNT, low=1, high=max(len(file.tensors), 1))
    attention = _attention(file, metadata, num_layers)
    window = _window(metadata, num_layers)
    architecture, model_type = _architecture(metadata, attention, window)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": _vocab_size(file, metadata),
        "hidden_size": metadata.integer(LLM.EMBEDDING_LENGTH, low=1, high=MAX_WIDTH),
        "intermediate_size": metadata.integer(LLM.FEED_FORWARD_LENGTH, low=1, high=MAX_WIDTH),
        "num_hidden_layers": num_layers,
        **attention,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.integer(LLM.CONTEXT_LENGTH, low=1, high=MAX_LENGTH),
        "rms_norm_eps": metadata.number(Attention.LAYERNORM_RMS_EPS),
        **rope_config(file, metadata, attention["head_dim"]),
        **_biases(file),
        **window,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _dtype(file),
        **generation_config(metadata),
    }


def _attention(file: GGUFFile, metadata: Metadata, num_layers: int) -> dict[str, Any]:
    """Heads, KV heads and head dimension; a KV-head count a layer makes a DeciLM of a Llama."""
    N = metadata.integer(Attention.HEAD_COUNT, low=1, high=MAX_HEADS)
    D = metadata.integer(LLM.EMBEDDING_LENGTH, low=1, high=MAX_WIDTH)
    H = metadata.integer(Attention.KEY_LENGTH, _default_head_dim(file, N, D), 1, MAX_HEAD_DIM)
    value_dim = metadata.integer(Attention.VALUE_LENGTH, H, low=1, high=MAX_HEAD_DIM)
    if value_dim != H:
        raise CheckpointError(
            f"{file.path}: {metadata.key(Attention.VALUE_LENGTH)} is {value_dim}, keys have {H}: "
            "heads whose values differ in size from their keys are not supported"
        )
    counts = metadata.integers(Attention.HEAD_COUNT_KV, num_layers, 0, MAX_HEADS) or [N]
    heads = {"num_attention_heads": N, "head_dim": H, "num_key_value_heads": counts[0] or N}
    if len(set(counts)) > 1:
        if metadata.architecture != "llama" or 0 in counts:
            raise CheckpointError(
                f"{file.path}: {metadata.key(Attention.HEAD_COUNT_KV)} differs from layer to "
                f"layer or is 0: not supported for {metadata.architecture}"
            )
        heads["num_key_value_heads_per_layer"] = counts
    return heads


def _default_head_dim(file: GGUFFile, num_heads: int, hidden_size: int) -> int:
    """H where the file names none: what q has; llama.cpp takes hidden size / heads."""
    q = file.tensors.get("blk.0.attn_q.weight")
    rows = q.shape[0] if q is not None and q.shape else hidden_size
    return rows // num_heads if rows % num_heads == 0 else hidden_size // num_heads


def _window(metadata: Metadata, num_layers: int) -> dict[str, Any]:
    """Fields about a sliding window; {} where all layers see everything."""
    window = metadata.integer(Attention.SLIDING_WINDOW, 0, high=MAX_LENGTH)
    has_window = _layers_with_window(metadata, num_layers)
    if not window or not any(has_window):
        return {}
    fields: dict[str, Any] = {"sliding_window": window}
    if metadata.architecture != "llama":  # Qwen has windows only where its config says so
        kinds = ("full_attention", "sliding_attention")
        layer_types = [kinds[each] for each in has_window]
        return {**fields, "use_sliding_window": True, "layer_types": layer_types}
    if not all(has_window):
        raise CheckpointError(
            f"{metadata.path}: {metadata.key(Attention.SLIDING_WINDOW_PATTERN)} leaves out layers: "
            "not supported for llama"
        )
    return fields


def _layers_with_window(metadata: Metadata, num_layers: int) -> list[bool]:
    """llama.cpp's pattern: a flag for each layer, or a period whose last layer has no window."""
    pattern = metadata.get(Attention.SLIDING_WINDOW_PATTERN)
    if isinstance(pattern, list):
        flags = metadata.items(Attention.SLIDING_WINDOW_PATTERN, bool, int, least=num_layers) or []
        return [bool(flag) for flag in flags[:num_layers]]
    period = metadata.integer(Attention.SLIDING_WINDOW_PATTERN, 0, high=MAX_LENGTH)
    return [period == 0 or layer % period < period - 1 for layer in range(num_layers)]


def _architecture(
    metadata: Metadata, attention: dict[str, Any], window: dict[str, Any]
) -> tuple[str, str]:
    architecture, model_type = ARCHITECTURES[metadata.architecture]
    if "num_key_value_heads_per_layer" in attention:
        architecture, model_type = "DeciLMForCausalLM", "deci"
    if metadata.architecture != "llama" or not window:
        return architecture, model_type
    if model_type != "llama":
        raise CheckpointError(
            f"{metadata.path} has a sliding window, and KV heads that differ from layer to layer: "
            "not supported together"
        )
    return "MistralForCausalLM", "mistral"


def _biases(file: GGUFFile) -> dict[str, bool]:
    """Which biases there are. llama.cpp takes each where it finds it; one stands for its group."""

    def has(*stems: str) -> bool:
        endings = tuple(f".{stem}.bias" for stem in stems)
        return any(name.endswith(endings) for name in file.tensors)

    qkv, out = has("attn_q", "attn_k", "attn_v"), has("attn_output")
    return {
        "attention_bias": qkv and out,
        "attention_qkv_bias": qkv,
        "attention_out_bias": out,
        "mlp_bias": has("ffn_gate", "ffn_up", "ffn_down"),
    }


def _vocab_size(file: GGUFFile, metadata: Metadata) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape:
        return embedding.shape[0]
    tokens = metadata.items(Keys.Tokenizer.LIST, str) or []
    return int(metadata.integer(LLM.VOCAB_SIZE, len(tokens), high=MAX_ELEMENTS))


def _dtype(file: GGUFFile) -> str:
    """What to compute in: the matrices' own dtype; bfloat16 for quantised ones."""
    kinds = Counter(
        "quantised" if isinstance(tensor, QuantisedTensor) else tensor.dtype.name
        for tensor in file.tensors.values()
        if len(tensor.shape) > 1
    )
    common = kinds.most_common(1)[0][0] if kinds else "float32"
    return common if common in ("float16", "float32") else "bfloat16"
