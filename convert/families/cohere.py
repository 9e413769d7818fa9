"""Command R, R+, R7B, A and Aya: a parallel layer behind one LayerNorm, and scaled logits.

Neighbours are rotated together. R+ norms each head with weights of its own. The second generation
(R7B, A) has windows, and rotates in those layers alone.
Source: the configurations and the modules of transformers' CohereModel and Cohere2Model.
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
from jaxengine.convert.model_spec import AttentionSpec, HeadNormSpec, ModelSpec

LAYOUT = Layout(pairs_neighbours=True)


def cohere_spec(config: Config) -> ModelSpec:
    """The first generation."""
    norm = layer_norm(config, "layer_norm_eps", has_bias=False)
    bias = fields.flag(config, "attention_bias")
    base = llama_like_spec(
        config, qkv_bias=bias, out_bias=bias, norm=norm, rope_theta=500_000.0, is_tied=True
    )
    scale = fields.number(config, "logit_scale", default=0.0625)
    base = replace(base, head=replace(base.head, scale=scale))
    base = each_layer(
        base, lambda _, layer: replace(layer, wiring="parallel", feed_forward_norm=None)
    )
    if not fields.flag(config, "use_qk_norm"):
        return base
    head_norm = HeadNormSpec(norm, scope="heads")
    return each_attention(base, lambda _, own: replace(own, head_norm=head_norm))


def cohere2_spec(config: Config) -> ModelSpec:
    """The second: three layers of four see a window, and only they know positions."""
    base = cohere_spec({**config, "use_qk_norm": False})
    window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    pattern = fields.integer(
        config, "sliding_window_pattern", "_sliding_window_pattern", default=4, high=1024
    )
    kinds = fields.list_of_layers(config, "layer_types", base.num_layers) or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(base.num_layers)
    ]

    def changed(number: int, attention: AttentionSpec) -> AttentionSpec:
        if kinds[number] == "sliding_attention":
            return replace(attention, sliding_window=window)
        return replace(attention, rope=None)

    return each_attention(base, changed)


table = functools.partial(decoder_table, layout=LAYOUT)

FAMILIES = (
    Family(
        ("CohereForCausalLM",),
        cohere_spec,
        table,
        examples="Command R, Command R+, Aya 23, Aya Expanse 8B and 32B",
    ),
    Family(
        ("Cohere2ForCausalLM",),
        cohere2_spec,
        table,
        examples="Command R7B, Command A",
    ),
)
