"""Phi 3.5 MoE: LayerNorms, experts chosen by SparseMixer, a long rope with factors of its own.

Source: the configuration and the modules of transformers' PhimoeModel.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields, llama
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.mixture_fields import mixture_spec, with_mixtures
from jaxengine.convert.families.mixtures import BLOCK_SPARSE
from jaxengine.convert.model_spec import ModelSpec, NormSpec, RouterSpec


def spec(config: Config) -> ModelSpec:
    """The spec of a PhimoeForCausalLM config."""
    eps = fields.number(config, "rms_norm_eps", default=1e-5, low=0.0)
    norm = NormSpec("layer", eps, has_bias=True)
    bias = fields.flag(config, "attention_bias")
    base = llama.llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        windows=(fields.window(config),) * fields.num_layers(config),
        rope_theta=1e6,
        norm=norm,
    )
    head = replace(base.head, has_bias=fields.flag(config, "lm_head_bias"))
    tolerance = fields.number(config, "router_jitter_noise", default=0.01, low=0.0)
    mixture = mixture_spec(
        config,
        router=RouterSpec("sparsemixer", tolerance=tolerance),
        num_experts=16,
        num_chosen=2,
        width="intermediate_size",
    )
    return with_mixtures(replace(base, head=head), mixture)


LAYOUT = Layout(experts=BLOCK_SPARSE)
FAMILIES = (
    Family(
        ("PhimoeForCausalLM", "PhiMoEForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        "Phi 3.5 MoE, Phi tiny and mini MoE",
    ),
)
