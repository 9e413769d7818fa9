"""Phi 3, 3.5 and 4: Llama with joined projections and rotary factors of short and long texts.

Source: the configuration and the modules of transformers' Phi3Model.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import llama_like_spec
from jaxengine.convert.model_spec import ModelSpec

LAYOUT = Layout(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def spec(config: Config) -> ModelSpec:
    """The spec of a Phi3ForCausalLM config."""
    window = None
    if config.get("sliding_window") is not None:
        window = fields.integer(config, "sliding_window", high=fields.MAX_LENGTH)
    return llama_like_spec(config, windows=(window,) * fields.num_layers(config))


FAMILIES = (
    Family(
        ("Phi3ForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Phi 3, 3.5 and 4, also mini",
    ),
)
