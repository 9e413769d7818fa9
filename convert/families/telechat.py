"""TeleChat 1 and 2: Llama under BLOOM's names, with one tensor for keys and values.

Source: the published configurations and model descriptions; arXiv:2401.03804.
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
    embedding="transformer.word_embeddings",
    layer="transformer.h.{i}",
    qkv=("self_attention.query", "self_attention.key_value"),
    out="self_attention.dense",
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a TeleChat2ForCausalLM config.

    Raises:
        ValueError: If a field makes no sense, or the embeddings are normalised, which no published
            model does.
    """
    if fields.flag(config, "embed_layernorm"):
        raise ValueError("config.json has embed_layernorm=true: only false is supported")
    N = fields.integer(config, "n_head", "num_attention_heads", high=fields.MAX_HEADS)
    K = fields.integer(config, "num_key_value_heads", default=N, high=fields.MAX_HEADS)
    fields.check_groups(N, K)
    H = fields.head_dim(config, N)
    norm = NormSpec("rms", fields.number(config, "layer_norm_epsilon", default=1e-5, low=0.0))
    attention = AttentionSpec(N, K, H, H**-0.5, rope=read_rope(config, H), out_bias=True)
    width = fields.integer(config, "ffn_hidden_size", "intermediate_size")
    feed_forward = FeedForwardSpec(width, "silu", down_bias=True)
    return uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, norm),
        final_norm=norm,
        length=fields.max_positions(config, "seq_length", "max_position_embeddings"),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings")),
    )


FAMILIES = (
    Family(
        ("TeleChat2ForCausalLM", "TeleChatForCausalLM", "TelechatForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="TeleChat 7B, 12B; TeleChat 2",
    ),
)
