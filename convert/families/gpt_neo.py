"""GPT-Neo (also TinyStories): GPT-2 with a window in every other layer, and unscaled scores.

Source: the configuration and the modules of transformers' GPTNeoModel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention, with_window
from jaxengine.convert.families.uniform import layer_norm, ungated, uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
)

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{i}",
    attention_norm="ln_1",
    feed_forward_norm="ln_2",
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    out="attn.attention.out_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a GPTNeoForCausalLM config."""
    D = fields.integer(config, "hidden_size")
    N = fields.integer(config, "num_heads", high=fields.MAX_HEADS)
    norm = layer_norm(config, "layer_norm_epsilon")
    attention = AttentionSpec(N, N, fields.head_dim(config, N), scale=1.0, out_bias=True)
    width = fields.integer(config, "intermediate_size", default=4 * D)
    feed_forward = ungated(width, fields.text(config, "activation_function", default="gelu_new"))
    length = fields.max_positions(config)
    base = uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, norm),
        final_norm=norm,
        embedding=EmbeddingSpec(num_positions=length),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings", default=True)),
    )
    kinds = list(_kinds(config.get("attention_types"), base.num_layers))
    window = fields.integer(config, "window_size", default=256, high=fields.MAX_LENGTH)
    return each_attention(
        base, lambda i, own: with_window(own, window if kinds[i] == "local" else None)
    )


def _kinds(types: Any, num_layers: int) -> Iterator[str]:
    """The kind of each layer, from pairs of a pattern and how often it comes."""
    types = types or [[["global", "local"], -(-num_layers // 2)]]
    try:
        kinds = [kind for pattern, times in types for _ in range(int(times)) for kind in pattern]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) < num_layers or not set(kinds) <= {"global", "local"}:
        raise ValueError(
            f"config.json has attention_types={types!r:.80}: pairs of a list of 'global' and "
            f"'local' and a number, for {num_layers} layers, are needed"
        )
    yield from kinds[:num_layers]


FAMILIES = (
    Family(
        ("GPTNeoForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="GPT-Neo 125M to 2.7B, TinyStories",
    ),
)
