"""gpt-oss: attention with sinks and windows by turns, experts with biases and a clamped SwiGLU.

Source: the configuration and the modules of transformers' GptOssModel.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields, llama
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.experts_table import ExpertsLayout
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.mixture_fields import mixture_spec, with_mixtures
from jaxengine.convert.model_spec import ModelSpec, RouterSpec

LAYOUT = Layout(
    experts=ExpertsLayout(
        router="mlp.router",
        gate_up=("mlp.experts.gate_up_proj",),
        down="mlp.experts.down_proj",
        gate_up_bias="mlp.experts.gate_up_proj_bias",
        down_bias="mlp.experts.down_proj_bias",
        is_transposed=True,
        is_interleaved=True,
    )
)


def spec(config: Config) -> ModelSpec:
    """The spec of a GptOssForCausalLM config."""
    config = {"rms_norm_eps": 1e-5, **config}
    bias = fields.flag(config, "attention_bias", default=True)
    base = llama.llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        windows=_windows(config),
        head_dim=64,
        rope_theta=150000.0,
    )
    base = llama.each_attention(base, lambda _, own: replace(own, has_sinks=True))
    mixture = mixture_spec(
        config,
        router=RouterSpec("softmax_chosen", has_bias=True),
        num_experts=128,
        num_chosen=4,
        width="intermediate_size",
    )
    mixture = replace(
        mixture,
        has_bias=True,
        swiglu_limit=fields.number(config, "swiglu_limit", default=7.0, low=0.0),
        swiglu_alpha=fields.number(config, "swiglu_alpha", default=1.702),
    )
    return with_mixtures(base, mixture)


def _windows(config: Config) -> tuple[int | None, ...]:
    """Every other layer has a window, beginning with the first, unless the config says which."""
    num_layers, window = fields.num_layers(config), fields.window(config, default=128)
    kinds = fields.list_of_layers(config, "layer_types", num_layers)
    if kinds is None:
        return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILIES = (
    Family(
        ("GptOssForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        "gpt-oss 20b and 120b",
    ),
)
