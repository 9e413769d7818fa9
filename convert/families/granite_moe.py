"""Granite's mixtures: Llama's shape with factors on embeddings, residuals, scores and logits.

Source: the configurations and the modules of transformers' GraniteMoe and GraniteMoeShared.
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
from jaxengine.convert.model_spec import EmbeddingSpec, FeedForwardSpec, ModelSpec, RouterSpec

LAYOUT = Layout(
    experts=ExpertsLayout(
        router="block_sparse_moe.router.layer",
        gate_up=("block_sparse_moe.input_linear.weight",),
        down="block_sparse_moe.output_linear.weight",
        shared_gate_up=("shared_mlp.input_linear",),
        shared_down="shared_mlp.output_linear",
    )
)


def spec(config: Config) -> ModelSpec:
    """The spec of a GraniteMoeForCausalLM or GraniteMoeSharedForCausalLM config."""
    bias = fields.flag(config, "attention_bias")
    base = llama.llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        embedding=EmbeddingSpec(fields.number(config, "embedding_multiplier", default=1.0)),
    )
    scale = fields.number(config, "attention_multiplier", default=1.0)
    residual_scale = fields.number(config, "residual_multiplier", default=1.0)
    layers = (
        replace(own, attention=replace(own.attention, scale=scale), residual_scale=residual_scale)
        for own in base.layers
    )
    divisor = fields.number(config, "logits_scaling", default=1.0, low=1e-6)
    mixture = mixture_spec(
        config,
        router=RouterSpec("softmax_chosen"),
        num_experts=8,
        num_chosen=2,
        width="intermediate_size",
    )
    if width := fields.integer(config, "shared_intermediate_size", default=0, low=0):
        mixture = replace(mixture, shared=FeedForwardSpec(width, mixture.activation))
    head = replace(base.head, scale=1 / divisor)
    return with_mixtures(replace(base, layers=tuple(layers), head=head), mixture)


FAMILIES = (
    Family(
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
    ),
)
