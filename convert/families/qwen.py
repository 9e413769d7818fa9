"""Qwen 1: Llama under GPT-2's names, with biases on queries, keys and values.

Behind ``seq_length`` its code stretches the rotary embedding and scales queries by the logarithm of
their position; the model is served up to there.
Source: the published configurations; arXiv:2309.16609, section 2.3.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope
from jaxengine.convert.families.uniform import uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    FeedForwardSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.wte",
    layer="transformer.h.{i}",
    attention_norm="ln_1",
    feed_forward_norm="ln_2",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    gate_up=("mlp.w2", "mlp.w1"),
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a QWenLMHeadModel config."""
    N = fields.integer(config, "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.integer(config, "kv_channels", default=128, high=fields.MAX_HEAD_DIM)
    norm = NormSpec("rms", fields.number(config, "layer_norm_epsilon", default=1e-6, low=0.0))
    bias = not fields.flag(config, "no_bias", default=True)
    rope = read_rope(config, H)
    attention = AttentionSpec(N, N, H, H**-0.5, rope=rope, qkv_bias=True, out_bias=bias)
    # Of two halves, the gate and what it gates.
    width = fields.integer(config, "intermediate_size") // 2
    feed_forward = FeedForwardSpec(width, "silu", up_bias=bias, down_bias=bias)
    return uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, norm),
        final_norm=norm,
        length=fields.max_positions(config, "seq_length", "max_position_embeddings"),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings")),
    )


FAMILIES = (
    Family(
        ("QWenLMHeadModel",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Qwen 1.8B to 72B (first generation)",
    ),
)
