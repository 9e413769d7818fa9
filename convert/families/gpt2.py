"""GPT-2: learned positions, LayerNorm, biases everywhere, weights stored as [in, out].

Source: the configuration and the modules of transformers' GPT2Model, and the report of Radford et
al., 2019.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{i}",
    attention_norm="ln_1",
    feed_forward_norm="ln_2",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    is_transposed=True,
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a GPT2LMHeadModel config."""
    D = fields.integer(config, "n_embd", "hidden_size")
    N = fields.integer(config, "n_head", "num_attention_heads", high=fields.MAX_HEADS)
    if D % N:
        raise ValueError(f"config.json has n_embd={D}, which n_head={N} does not divide")
    H = D // N
    length = fields.max_positions(config, "n_positions", "n_ctx", "max_position_embeddings")
    norm = NormSpec(
        "layer",
        fields.number(config, "layer_norm_epsilon", default=1e-5, low=0.0),
        has_bias=True,
    )
    is_scaled = fields.flag(config, "scale_attn_weights", default=True)
    num_layers = fields.num_layers(config, "n_layer", "num_hidden_layers")
    by_layer = fields.flag(config, "scale_attn_by_inverse_layer_idx")
    feed_forward = FeedForwardSpec(
        fields.integer(config, "n_inner", default=4 * D),
        fields.text(config, "activation_function", default="gelu_new"),
        is_gated=False,
        up_bias=True,
        down_bias=True,
    )

    def layer(number: int) -> LayerSpec:
        scale = (H**-0.5 if is_scaled else 1.0) / (number + 1 if by_layer else 1)
        attention = AttentionSpec(N, N, H, scale, qkv_bias=True, out_bias=True)
        return LayerSpec(attention, feed_forward, norm, norm)

    return ModelSpec(
        architecture=config["architectures"][0],
        vocab_size=fields.vocab_size(config),
        hidden_size=D,
        max_position_embeddings=length,
        layers=tuple(layer(number) for number in range(num_layers)),
        final_norm=norm,
        embedding=EmbeddingSpec(num_positions=length),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings", default=True)),
    )


FAMILIES = (
    Family(
        ("GPT2LMHeadModel",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="GPT-2, DistilGPT-2, Cerebras-GPT",
    ),
)
