"""HunYuan, dense: Llama whose queries and keys are normalised behind the rotation.

Its rotary embedding may have a fixed ``alpha``, which stretches the base as dynamic scaling would.
Source: the configuration and the modules of transformers' HunYuanDenseV1Model.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention, llama_like_spec
from jaxengine.convert.families.rope import rope_parameters
from jaxengine.convert.model_spec import AttentionSpec, HeadNormSpec, ModelSpec, NormSpec, RopeSpec

LAYOUT = Layout(head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"))


def spec(config: Config) -> ModelSpec:
    """The spec of a HunYuanDenseV1ForCausalLM config."""
    scaling = rope_parameters(config)
    alpha = fields.number(scaling, "alpha", default=0.0, low=0.0)
    theta = fields.number({**config, **scaling}, "rope_theta", default=10000.0, low=1e-3)
    plain = {**config, "rope_parameters": None, "rope_scaling": None} if alpha else config
    bias = fields.flag(config, "attention_bias")
    norm = NormSpec("rms", fields.number(config, "rms_norm_eps", default=1e-5, low=0.0))
    base = llama_like_spec(plain, qkv_bias=bias, out_bias=bias, norm=norm)
    head_norm = HeadNormSpec(norm, follows_rope=True)

    def changed(_: int, attention: AttentionSpec) -> AttentionSpec:
        H = attention.head_dim
        rope = RopeSpec(H, theta * alpha ** (H / (H - 2))) if alpha else attention.rope
        return replace(attention, rope=rope, head_norm=head_norm)

    return each_attention(base, changed)


FAMILIES = (
    Family(
        ("HunYuanDenseV1ForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Hunyuan 0.5B to 7B",
    ),
)
