"""A block takes of each layer what it needs, and no more."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxengine.engine.device.kv_cache import KVCacheSpec, kv_heads
from jaxengine.model_config import ModelConfig
from tests.helpers import greedy, make_llm, output_ids, save_tiny_model

DECI_7B = {
    "architectures": ["DeciLMForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "num_key_value_heads_per_layer": [4] * 4 + [4] * 8 + [2] * 8 + [1] * 12,
}


def test_deci_pays_for_each_layers_own_heads_and_not_for_the_widest() -> None:
    heads = kv_heads(ModelConfig.from_hf(DECI_7B), range(32), num_shards=1)
    spec = KVCacheSpec(heads, 16, "bfloat16")
    # 12 layers of 4 heads, 8 of 2, 12 of 1: 76 heads of 128; keys and values; 2 bytes.
    assert spec.block_bytes == 76 * 128 * 16 * 2 * 2
    assert spec.block_bytes / (32 * 4 * 128 * 16 * 2 * 2) == 76 / 128


def test_heads_are_repeated_up_to_the_number_of_shards() -> None:
    heads = kv_heads(ModelConfig.from_hf(DECI_7B), range(12, 24), num_shards=2)
    assert heads == ((2, 128, 128),) * 12


def test_a_layer_without_attention_takes_nothing() -> None:
    attention, nothing = {"n_heads_in_group": 8}, {"no_op": True}
    blocks = [{"attention": nothing if i % 2 else attention, "ffn": {"ffn_mult": 1.0}}
              for i in range(32)]  # fmt: skip
    spec = ModelConfig.from_hf(
        {**DECI_7B, "num_key_value_heads_per_layer": None, "block_configs": blocks}
    )
    assert kv_heads(spec, range(32), num_shards=1) == ((4, 128, 128),) * 16


def test_an_engine_serves_layers_of_different_kv_heads(tmp_path: Path) -> None:
    # A layer of one KV head is a Llama's layer of two that are equal.
    model = save_tiny_model(tmp_path, "Llama", num_key_value_heads=2)
    tensors = {name: values.numpy() for name, values in model.state_dict().items()}
    names = [f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "kv"]
    config = json.loads((tmp_path / "config.json").read_text())
    prompts = [[5, 6, 7, 8], list(range(20, 60))]

    def tokens(copies: int, **fields: object) -> list[list[int]]:
        own = {name: np.tile(tensors[name][:8], (copies, 1)) for name in names}
        save_file({**tensors, **own}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
        llm = make_llm(tmp_path, skip_tokenizer_init=True)
        return output_ids(llm.generate(prompts, greedy(6), use_tqdm=False))

    deci = {"architectures": ["DeciLMForCausalLM"], "num_key_value_heads_per_layer": [2, 1, 2]}
    assert tokens(1, **deci) == tokens(2)
