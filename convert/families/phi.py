"""Phi 1, 1.5 and 2: attention and feed-forward layer side by side behind one LayerNorm.

Source: the configuration and the modules of transformers' PhiModel.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope, stretched_length
from jaxengine.convert.model_spec import (
    AttentionSpec,
    FeedForwardSpec,
    HeadNormSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)

LAYOUT = Layout(
    out="self_attn.dense",
    gate_up=("mlp.fc1",),
    down="mlp.fc2",
    head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    final_norm="model.final_layernorm",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a PhiForCausalLM config."""
    N, K = fields.head_counts(config)
    H = fields.head_dim(config, N)
    D = fields.integer(config, "hidden_size")
    norm = NormSpec(
        "layer", fields.number(config, "layer_norm_eps", default=1e-5, low=0.0), has_bias=True
    )
    attention = AttentionSpec(
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        scale=H**-0.5,
        rope=read_rope(config, H, fraction=0.5),
        head_norm=HeadNormSpec(norm) if fields.flag(config, "qk_layernorm") else None,
        qkv_bias=True,
        out_bias=True,
    )
    feed_forward = FeedForwardSpec(
        fields.integer(config, "intermediate_size", default=4 * D),
        fields.text(config, "hidden_act", default="gelu_new"),
        is_gated=False,
        up_bias=True,
        down_bias=True,
    )
    layer = LayerSpec(attention, feed_forward, norm, None, wiring="parallel")
    return ModelSpec(
        architecture=config["architectures"][0],
        vocab_size=fields.vocab_size(config),
        hidden_size=D,
        max_position_embeddings=stretched_length(config, fields.max_positions(config)),
        layers=(layer,) * fields.num_layers(config),
        final_norm=norm,
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings"), has_bias=True),
    )


FAMILIES = (
    Family(
        ("PhiForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Phi 1, 1.5 and 2",
    ),
)
