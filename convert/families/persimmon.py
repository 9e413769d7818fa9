"""Persimmon: LayerNorms of each query and key, half of each head rotated, squared ReLU.

Source: the configuration and the modules of transformers' PersimmonModel.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope
from jaxengine.convert.families.uniform import layer_norm, ungated, uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    HeadNormSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
)

LAYOUT = Layout(
    qkv=("self_attn.query_key_value",),
    joined="grouped",
    out="self_attn.dense",
    head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="model.final_layernorm",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a PersimmonForCausalLM config."""
    N = fields.integer(config, "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.head_dim(config, N)
    norm = layer_norm(config, "layer_norm_eps")
    attention = AttentionSpec(
        N,
        N,
        H,
        H**-0.5,
        rope=read_rope(config, H, theta=25000.0, fraction=0.5),
        head_norm=HeadNormSpec(norm) if fields.flag(config, "qk_layernorm", default=True) else None,
        qkv_bias=True,
        out_bias=True,
    )
    activation = fields.text(config, "hidden_act", default="relu2")
    feed_forward = ungated(fields.integer(config, "intermediate_size"), activation)
    return uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, norm),
        final_norm=norm,
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings")),
    )


FAMILIES = (
    Family(
        ("PersimmonForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Persimmon 8B",
    ),
)
