"""Granite's mixtures: Granite with experts, and in GraniteMoeShared a layer beside them.

Source: the configurations and the modules of transformers' GraniteMoe and GraniteMoeShared.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.experts_table import ExpertsLayout
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama_variants import granite_spec
from jaxengine.convert.families.mixture_fields import mixture_spec, with_mixtures
from jaxengine.convert.model_spec import FeedForwardSpec, ModelSpec, RouterSpec

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
    base = granite_spec(config)
    mixture = mixture_spec(
        config,
        router=RouterSpec("softmax_chosen"),
        num_experts=8,
        num_chosen=2,
        width="intermediate_size",
    )
    if width := fields.integer(config, "shared_intermediate_size", default=0, low=0):
        mixture = replace(mixture, shared=FeedForwardSpec(width, mixture.activation))
    return with_mixtures(base, mixture)


FAMILIES = (
    Family(
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        "Granite 3.0 and 3.1 1B-A400M and 3B-A800M, PowerMoE 3B",
    ),
)
