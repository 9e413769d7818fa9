"""GPT-NeoX (also Pythia, Dolly, RedPajama): two norms of one stream, a quarter of heads rotated.

Source: the configuration and the modules of transformers' GPTNeoXModel.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope
from jaxengine.convert.families.uniform import layer_norm, ungated, uniform_spec
from jaxengine.convert.model_spec import AttentionSpec, HeadSpec, LayerSpec, ModelSpec, Wiring

LAYOUT = Layout(
    prefix="gpt_neox.",
    embedding="gpt_neox.embed_in",
    layer="gpt_neox.layers.{i}",
    qkv=("attention.query_key_value",),
    joined="grouped",
    out="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a GPTNeoXForCausalLM config."""
    N = fields.integer(config, "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.head_dim(config, N)
    norm = layer_norm(config, "layer_norm_eps")
    bias = fields.flag(config, "attention_bias", default=True)
    rope = read_rope(config, H, fraction=0.25)
    attention = AttentionSpec(N, N, H, H**-0.5, rope=rope, qkv_bias=bias, out_bias=bias)
    activation = fields.text(config, "hidden_act", default="gelu")
    feed_forward = ungated(fields.integer(config, "intermediate_size"), activation)
    is_parallel = fields.flag(config, "use_parallel_residual", default=True)
    wiring: Wiring = "parallel" if is_parallel else "sequential"
    return uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, norm, wiring=wiring),
        final_norm=norm,
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings")),
    )


FAMILIES = (
    Family(
        ("GPTNeoXForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="GPT-NeoX 20B, Pythia, Dolly 2, RedPajama-INCITE, StableLM alpha",
    ),
)
