"""OLMo 1, 2 and 3: norms without weights; then norms behind each part and over all heads; windows.

Source: the configurations and the modules of transformers' OlmoModel, Olmo2Model and Olmo3Model.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention, each_layer, llama_like_spec
from jaxengine.convert.families.rope import read_rope
from jaxengine.convert.model_spec import AttentionSpec, HeadNormSpec, LayerSpec, ModelSpec, NormSpec

BEHIND = Layout(
    attention_out_norm="post_attention_layernorm",
    feed_forward_out_norm="post_feedforward_layernorm",
)


def olmo_spec(config: Config) -> ModelSpec:
    """OLMo 1: LayerNorms without parameters; queries, keys and values may be cut to a range."""
    bias = fields.flag(config, "attention_bias")
    norm = NormSpec("layer", 1e-5, has_weight=False)
    base = llama_like_spec(config, qkv_bias=bias, out_bias=bias, norm=norm)
    if config.get("clip_qkv") is None:
        return base
    clip = fields.number(config, "clip_qkv", low=0.0)
    return each_attention(base, lambda _, own: replace(own, qkv_clip=clip))


def olmo2_spec(config: Config) -> ModelSpec:
    """OLMo 2: the stream is read as it is, what joins it is normalised."""
    bias = fields.flag(config, "attention_bias")
    norm = NormSpec("rms", fields.number(config, "rms_norm_eps", default=1e-5, low=0.0))
    base = llama_like_spec(config, qkv_bias=bias, out_bias=bias, norm=norm, rope_theta=500_000.0)
    head_norm = HeadNormSpec(norm, scope="all")
    base = each_attention(base, lambda _, own: replace(own, head_norm=head_norm))
    return each_layer(base, lambda _, layer: norms_behind(layer))


def olmo3_spec(config: Config) -> ModelSpec:
    """OLMo 3: and a window in three layers of four, which are never scaled."""
    base = olmo2_spec(config)
    window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    kinds = fields.list_of_layers(config, "layer_types", base.num_layers) or [
        "sliding_attention" if (layer + 1) % 4 else "full_attention"
        for layer in range(base.num_layers)
    ]
    rope = _unscaled(config)

    def changed(number: int, attention: AttentionSpec) -> AttentionSpec:
        if kinds[number] != "sliding_attention":
            return attention
        local = read_rope(rope, attention.head_dim, layer_type="sliding_attention", theta=500_000.0)
        return replace(attention, sliding_window=window, rope=local)

    return each_attention(base, changed)


def _unscaled(config: Config) -> Config:
    """The fields that windows turn by: in the older spelling the scaling is of the others alone."""
    return {name: value for name, value in config.items() if name != "rope_scaling"}


def norms_behind(layer: LayerSpec) -> LayerSpec:
    """The layer with its norms on what joins the stream, not on what is read of it."""
    return replace(
        layer,
        attention_out_norm=layer.attention_norm,
        feed_forward_out_norm=layer.feed_forward_norm,
        attention_norm=None,
        feed_forward_norm=None,
    )


FAMILIES = (
    Family(
        ("OlmoForCausalLM",),
        olmo_spec,
        functools.partial(decoder_table, layout=Layout()),
        examples="OLMo 1B, 7B",
    ),
    Family(
        ("Olmo2ForCausalLM",),
        olmo2_spec,
        functools.partial(decoder_table, layout=BEHIND),
        examples="OLMo 2 1B to 32B",
    ),
    Family(
        ("Olmo3ForCausalLM",),
        olmo3_spec,
        functools.partial(decoder_table, layout=BEHIND),
        examples="OLMo 3 7B, 32B",
    ),
)
