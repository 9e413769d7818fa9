"""StarCoder 2: Llama's attention with biases and a window, GPT-2's norms and feed-forward layer.

Source: the configuration and the modules of transformers' Starcoder2Model.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import llama_like_spec
from jaxengine.convert.families.uniform import layer_norm
from jaxengine.convert.model_spec import ModelSpec

LAYOUT = Layout(gate_up=("mlp.c_fc",), down="mlp.c_proj")


def spec(config: Config) -> ModelSpec:
    """The spec of a Starcoder2ForCausalLM config."""
    bias = fields.flag(config, "use_bias", default=True)
    window = None
    if config.get("sliding_window") is not None:
        window = fields.integer(config, "sliding_window", high=fields.MAX_LENGTH)
    return llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=(window,) * fields.num_layers(config),
        norm=layer_norm(config, "norm_epsilon"),
        activation="gelu_pytorch_tanh",
        is_gated=False,
        is_tied=True,
    )


FAMILIES = (
    Family(
        ("Starcoder2ForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="StarCoder 2 3B, 7B, 15B",
    ),
)
