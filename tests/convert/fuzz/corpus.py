"""One small checkpoint of each format, to be damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxengine.convert import convert_checkpoint
from safetensors.numpy import save_file

from tests.convert.tiny_gguf import finish, gguf_name, permuted

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


def weights() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    D, F, V, H = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    N, K = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (V, D)
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (N * H, D),
            layer + "self_attn.k_proj.weight": (K * H, D),
            layer + "self_attn.v_proj.weight": (K * H, D),
            layer + "self_attn.o_proj.weight": (D, N * H),
            layer + "mlp.gate_proj.weight": (F, D),
            layer + "mlp.up_proj.weight": (F, D),
            layer + "mlp.down_proj.weight": (D, F),
        }
    return {name: chance.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def byte_letters() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def write_tokenizer(directory: Path) -> None:
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, text in enumerate(SPECIAL_TOKENS)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = True
    vocab = {text: i for i, text in enumerate(SPECIAL_TOKENS + byte_letters())}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _directory(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    return directory


def safetensors(directory: Path) -> None:
    save_file(weights(), _directory(directory) / "model.safetensors", {"format": "pt"})


def sharded(directory: Path) -> None:
    tensors = list(weights().items())
    _directory(directory)
    weight_map = {}
    for number, part in enumerate((tensors[:9], tensors[9:])):
        shard = f"model-{number + 1:05}-of-00002.safetensors"
        save_file(dict(part), directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(dict(part), shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def torch_bin(directory: Path) -> None:
    import torch

    state = {name: torch.from_numpy(values) for name, values in weights().items()}
    torch.save(state, _directory(directory) / "pytorch_model.bin")


def gguf_file(directory: Path) -> None:
    directory.mkdir(parents=True)
    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    writer.add_custom_alignment(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*SPECIAL_TOKENS[:4], *byte_letters(), "he"])
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, values in weights().items():
        if "q_proj" in name:
            values = permuted(values, CONFIG["num_attention_heads"])
        if "k_proj" in name:
            values = permuted(values, CONFIG["num_key_value_heads"])
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    finish(writer, path)


def tokenizer(directory: Path) -> None:
    safetensors(directory)
    write_tokenizer(directory)


def converted(directory: Path) -> None:
    source = directory.with_name("to-convert")
    safetensors(source)
    convert_checkpoint(source, directory, progress=False)
    shutil.rmtree(source)


FORMATS: dict[str, Callable[[Path], None]] = {
    "safetensors": safetensors,
    "index": sharded,
    "config": safetensors,
    "pytorch_bin": torch_bin,
    "gguf": gguf_file,
    "tokenizer": tokenizer,
    "converted": converted,
}
