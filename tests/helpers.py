"""What several test files need: tiny random HF models, and our models' logits at every position."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxengine.batch import InputBatch
from jaxengine.config import ModelConfig
from jaxengine.engine.kv_cache import CACHE_SPEC, KVCacheSpec
from jaxengine.models.decoder import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.sharding import make_mesh
from jaxengine.weights import load_params, merge_params, open_model, param_specs

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_tiny_model(directory: Path, family: str, seed: int = 0, **overrides: Any) -> Any:
    """Save a random HF model of a family ("Llama", "Qwen3", ...) in float32; return it.

    Norms and biases are randomised too: at their initial 1 and 0 they would hide mistakes.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 1.0 if "norm" in name else 0.0
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def hf_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """Logits [T, V] of an HF model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def our_logits(
    source: Path, token_ids: list[int], *, max_model_len: int = 256, num_shards: int = 1
) -> np.ndarray:
    """Logits [T, V] of our model, as one prefill of a single row."""
    checkpoint = open_model(source)
    config = ModelConfig.from_hf(checkpoint.hf_config, "float32")
    options = ModelOptions(
        num_kv_heads=max(config.num_kv_heads, num_shards), max_model_len=max_model_len
    )
    factory = ModelRegistry.resolve(config.architecture)
    definition, specs = param_specs(lambda: factory(config, options))
    mesh = make_mesh(jax.devices()[:num_shards])
    params = load_params(checkpoint, specs, mesh, show_progress=False)
    cache_spec = KVCacheSpec(
        config.num_layers, options.num_kv_heads, config.head_dim, 16, config.dtype
    )
    num_blocks = -(-len(token_ids) // 16)
    caches = cache_spec.allocate(num_blocks + 1, mesh)

    def all_logits(params: dict, caches: list, batch: InputBatch) -> jax.Array:
        model = merge_params(definition, params)
        hidden, _ = model(batch, caches)
        return model.compute_logits(hidden)

    cache_specs = [(CACHE_SPEC, CACHE_SPEC)] * config.num_layers
    sharded = jax.shard_map(
        all_logits,
        mesh=mesh,
        in_specs=({path: spec.spec for path, spec in specs.items()}, cache_specs, P()),
        out_specs=P(),
        check_vma=False,
    )
    return np.asarray(jax.jit(sharded)(params, caches, _prefill_batch(token_ids, num_blocks)))


def _prefill_batch(token_ids: list[int], num_blocks: int) -> InputBatch:
    ints = functools.partial(jnp.array, dtype=jnp.int32)
    length = len(token_ids)
    positions = np.arange(length)
    return InputBatch(
        token_ids=ints(token_ids),
        positions=ints(positions),
        slot_mapping=ints(positions + 16),  # blocks 1, 2, ... in order
        block_tables=ints([range(1, num_blocks + 1)]),
        seq_lens=ints([length]),
        query_start_loc=ints([0, length]),
        num_decode_rows=ints(0),
        logits_indices=ints([length - 1]),
        decode_only=False,
    )
