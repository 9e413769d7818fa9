"""StableLM: Llama with LayerNorms and a partial rotation; the 12B norms each head by itself.

Source: the configuration and the modules of transformers' StableLmModel.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention, each_layer, llama_like_spec
from jaxengine.convert.families.uniform import layer_norm
from jaxengine.convert.model_spec import HeadNormSpec, ModelSpec

LAYOUT = Layout(
    head_norms=("self_attn.q_layernorm.norms.{h}", "self_attn.k_layernorm.norms.{h}"),
)


def spec(config: Config) -> ModelSpec:
    """The spec of a StableLmForCausalLM config."""
    norm = layer_norm(config, "layer_norm_eps", "norm_eps")
    base = llama_like_spec(
        config,
        qkv_bias=fields.flag(config, "use_qkv_bias"),
        norm=norm,
        rotary_fraction=0.25,
    )
    if fields.flag(config, "qk_layernorm"):
        head_norm = HeadNormSpec(replace(norm, has_bias=False), scope="heads")
        base = each_attention(base, lambda _, own: replace(own, head_norm=head_norm))
    if fields.flag(config, "use_parallel_residual"):
        base = each_layer(
            base, lambda _, layer: replace(layer, wiring="parallel", feed_forward_norm=None)
        )
    return base


FAMILIES = (
    Family(
        ("StableLmForCausalLM", "StableLMEpochForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="StableLM 3B, 2 1.6B, 2 12B, Zephyr",
    ),
)
