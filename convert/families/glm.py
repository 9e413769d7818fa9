"""GLM 4 and GLM 4 (0414) in transformers' layout: half of each head turned, in neighbouring pairs.

Those of 2025 norm what joins the stream too. ChatGLM's layout is in ``chatglm``.
Source: the configurations and the modules of transformers' GlmModel and Glm4Model.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_layer, llama_like_spec
from jaxengine.convert.model_spec import ModelSpec

LAYOUT = Layout(gate_up=("mlp.gate_up_proj",), pairs_neighbours=True)
SANDWICH = replace(
    LAYOUT,
    attention_out_norm="post_self_attn_layernorm",
    feed_forward_out_norm="post_mlp_layernorm",
)


def glm_spec(config: Config) -> ModelSpec:
    """GLM 4 of 2024."""
    bias = fields.flag(config, "attention_bias", default=True)
    return llama_like_spec(config, qkv_bias=bias, head_dim=128, rotary_fraction=0.5)


def glm4_spec(config: Config) -> ModelSpec:
    """GLM 4 of 2025."""
    return each_layer(
        glm_spec(config),
        lambda _, layer: replace(
            layer,
            attention_out_norm=layer.attention_norm,
            feed_forward_out_norm=layer.feed_forward_norm,
        ),
    )


FAMILIES = (
    Family(
        ("GlmForCausalLM",),
        glm_spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="GLM-4 9B in transformers' layout, GLM-Edge",
    ),
    Family(
        ("Glm4ForCausalLM",),
        glm4_spec,
        functools.partial(decoder_table, layout=SANDWICH),
        examples="GLM-4 9B and 32B (0414), GLM-Z1",
    ),
)
