"""Nemotron 3, 4 and Minitron: LayerNorms by ``1 + weight``, squared ReLU without a gate.

Source: the configuration and the modules of transformers' NemotronModel; arXiv:2402.16819.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import llama_like_spec
from jaxengine.convert.families.uniform import layer_norm
from jaxengine.convert.model_spec import ModelSpec

LAYOUT = Layout(gate_up=("mlp.up_proj",))


def spec(config: Config) -> ModelSpec:
    """The spec of a NemotronForCausalLM config."""
    bias = fields.flag(config, "attention_bias")
    return llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag(config, "mlp_bias"),
        norm=replace(layer_norm(config, "norm_eps"), offset=1.0),
        rotary_fraction=0.5,
        activation="relu2",
        is_gated=False,
    )


FAMILIES = (
    Family(
        ("NemotronForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Nemotron 3 8B, Minitron 4B and 8B, Nemotron 4",
    ),
)
