"""InternLM 1, 2 and 3: Llama with biases; then with one tensor per layer for all heads.

Source: the published configurations and model descriptions; InternLM2: arXiv:2403.17297.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import llama_like_spec
from jaxengine.convert.model_spec import ModelSpec

INTERNLM2 = Layout(
    embedding="model.tok_embeddings",
    attention_norm="attention_norm",
    feed_forward_norm="ffn_norm",
    qkv=("attention.wqkv",),
    joined="grouped",
    out="attention.wo",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    head="output",
)


def internlm_spec(config: Config) -> ModelSpec:
    """InternLM 1: biases in attention; its rotary embedding may have an object of its own."""
    bias = fields.flag(config, "bias", default=True)
    return llama_like_spec(_with_rotary(config), qkv_bias=bias, out_bias=bias)


def _with_rotary(config: Config) -> Config:
    """``rotary`` (a base, a type, a factor) in the spelling of all others.

    Its dynamic type without a factor begins to stretch behind the longest sequence of the model.
    """
    rotary = fields.mapping(config, "rotary")
    theta = fields.number(rotary, "base", default=10000.0, low=1e-3)
    merged: dict[str, Any] = {"rope_theta": theta, **config}
    factor = fields.number(rotary, "scaling_factor", default=1.0, low=1.0)
    if rotary.get("type") == "dynamic" and factor > 1:
        merged["rope_scaling"] = {"type": "dynamic", "factor": factor}
    return merged


def internlm2_spec(config: Config) -> ModelSpec:
    """InternLM 2 and 2.5: grouped heads, each group's queries, key and value together."""
    bias = fields.flag(config, "bias")
    return llama_like_spec(config, qkv_bias=bias, out_bias=bias)


def internlm3_spec(config: Config) -> ModelSpec:
    """InternLM 3: Llama with two flags for biases."""
    bias = fields.flag(config, "bias")
    return llama_like_spec(
        config, qkv_bias=fields.flag(config, "qkv_bias"), out_bias=bias, mlp_bias=bias
    )


table = functools.partial(decoder_table, layout=Layout())

FAMILIES = (
    Family(
        ("InternLMForCausalLM",),
        internlm_spec,
        table,
        examples="InternLM 7B, 20B",
    ),
    Family(
        ("InternLM2ForCausalLM",),
        internlm2_spec,
        functools.partial(decoder_table, layout=INTERNLM2),
        examples="InternLM 2 and 2.5, 1.8B to 20B",
    ),
    Family(
        ("InternLM3ForCausalLM",),
        internlm3_spec,
        table,
        examples="InternLM 3 8B",
    ),
)
