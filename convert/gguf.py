"""A GGUF file seen as a Hugging Face checkpoint: its config, and its tensors under HF's names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxengine.convert.checkpoint import Checkpoint
from jaxengine.convert.gguf_file import GGUFFile, QuantisedTensor, read_gguf
from jaxengine.convert.gguf_tokenizer import generation_config, tokenizer_files
from jaxengine.convert.tensors import MappedTensor, StoredTensor, read

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}

# Frequency factors of llama3 RoPE: not a parameter, it becomes part of the config.
ROPE_FREQS = "rope_freqs.weight"


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        ValueError: If the file is damaged, one of several parts, or of an unsupported model.
    """
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is a file but no .gguf: give the model's directory instead")
    file = read_gguf(path)
    if file.metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {file.metadata['split.count']} parts: join them first, with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    config = hf_config(file)
    return Checkpoint(
        source=path,
        format="gguf",
        hf_config=config,
        tensors=_hf_tensors(file, config),
        tokenizer_files=lambda: tokenizer_files(file.metadata),
        generation_config=generation_config(file.metadata),
    )


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that a file's metadata and tensors amount to.

    Raises:
        ValueError: If the model is not supported or the metadata lacks a value.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} holds a model of architecture {name!r}, which is not supported as GGUF; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    values = _Values(file.path, name, file.metadata)
    architecture, model_type = ARCHITECTURES[name]
    window = values.get("attention.sliding_window")
    if name == "llama" and window:
        architecture, model_type = "MistralForCausalLM", "mistral"
    N, D = int(values["attention.head_count"]), int(values["embedding_length"])
    head_dim = values.get("attention.key_length") or values.get("rope.dimension_count") or D // N
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": _vocab_size(file, len(tokens)),
        "hidden_size": D,
        "intermediate_size": int(values["feed_forward_length"]),
        "num_hidden_layers": int(values["block_count"]),
        "num_attention_heads": N,
        "num_key_value_heads": int(values.get("attention.head_count_kv") or N),
        "head_dim": int(head_dim),
        "hidden_act": "silu",
        "max_position_embeddings": int(values["context_length"]),
        "rms_norm_eps": float(values["attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(values.get("rope.freq_base") or 10000.0),
        "rope_scaling": _rope_scaling(file, values, int(head_dim)),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _dtype(file),
        **generation_config(file.metadata),
    }
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = window
    return config


@dataclass(frozen=True)
class _Values:
    """The metadata under the architecture's prefix."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]

    def get(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):  # one number a layer
            if len(set(value)) != 1:
                raise ValueError(f"{self.path}: {key} differs from layer to layer: not supported")
            return value[0]
        return value

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} lacks the metadata key {self.architecture}.{key}")
        return value


def _vocab_size(file: GGUFFile, num_tokens: int) -> int:
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None and embedding.shape else num_tokens


def _dtype(file: GGUFFile) -> str:
    """What to compute in: the matrices' own dtype; bfloat16 for quantised ones."""
    kinds = Counter(
        "quantised" if isinstance(tensor, QuantisedTensor) else tensor.dtype.name
        for tensor in file.tensors.values()
        if len(tensor.shape) > 1
    )
    common = kinds.most_common(1)[0][0] if kinds else "float32"
    return common if common in ("float16", "float32") else "bfloat16"


def _rope_scaling(file: GGUFFile, values: _Values, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file, values, head_dim)
    kind = values.get("rope.scaling.type")
    factor = values.get("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{file.path} scales RoPE by {kind!r}; supported: linear, yarn, llama3")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    original = values.get("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama3_scaling(file: GGUFFile, values: _Values, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling: the file has only its result, a factor for each frequency.

    The parameters are those of every Llama from 3.1 on; that they give the file's numbers is
    checked. Source of the formula: transformers, modeling_rope_utils.py.
    """
    found = read(file.tensors[ROPE_FREQS])
    factor, low, high, original = round(float(found.max()), 3), 1.0, 4.0, 8192
    base = float(values.get("rope.freq_base") or 10000.0)
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ValueError(f"{file.path}: {ROPE_FREQS} is not the scaling of any known Llama")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _hf_tensors(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    # llama.cpp reorders the rows of q and k only where it also rotates interleaved pairs.
    is_permuted = file.metadata["general.architecture"] == "llama"
    tensors = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        hf_name = _hf_name(name)
        if is_permuted and re.search(r"self_attn\.[qk]_proj\.", hf_name):
            tensor = InterleavedTensor(hf_name, tensor, config["head_dim"])
        elif isinstance(tensor, (MappedTensor, QuantisedTensor)):
            tensor = replace(tensor, name=hf_name)
        tensors[hf_name] = tensor
    return tensors


def _hf_name(name: str) -> str:
    """HF's name of a GGUF tensor; the name itself if there is none, which a rule then reports."""
    layer = re.match(r"blk\.(\d+)\.", name)
    stem, _, kind = name.rpartition(".")
    if layer:
        stem = "blk.{i}." + stem[layer.end() :]
    if stem not in NAMES:
        return name
    return f"{NAMES[stem]}.{kind}".replace("{i}", layer.group(1) if layer else "")


@dataclass(frozen=True)
class InterleavedTensor:
    """A q or k projection in llama.cpp's row order, given out in Hugging Face's.

    llama.cpp rotates neighbouring rows of a head, HF row j with row j + H/2. The file's rows of
    a head are therefore HF's rows 0, H/2, 1, H/2 + 1, ...
    """

    name: str
    stored: StoredTensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in both orders."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the stored tensor."""
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stored.nbytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` in HF's order; whole heads are read for it."""
        H = self.head_dim
        first, last = start // H * H, -(-stop // H) * H
        stored = self.stored.rows(first, min(last, self.shape[0]))
        heads = stored.reshape(-1, H // 2, 2, *stored.shape[1:]).swapaxes(1, 2)
        return heads.reshape(stored.shape)[start - first : stop - first]
