"""BLOOM: ALiBi in place of positions, a norm of the embeddings, LayerNorm and biases.

Source: the configuration and the modules of transformers' BloomModel; arXiv:2211.05100.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.alibi import alibi_slopes
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.uniform import layer_norm, ungated, uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
)

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layer="transformer.h.{i}",
    qkv=("self_attention.query_key_value",),
    joined="grouped",
    out="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a BloomForCausalLM config.

    Raises:
        ValueError: If a field makes no sense, or the residual is the norm's output, which no
            published model has.
    """
    if fields.flag(config, "apply_residual_connection_post_layernorm"):
        raise ValueError(
            "config.json has apply_residual_connection_post_layernorm=true: only false is supported"
        )
    D = fields.integer(config, "hidden_size", "n_embed")
    N = fields.integer(config, "n_head", "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.head_dim({"hidden_size": D}, N)
    norm = layer_norm(config, "layer_norm_epsilon")
    attention = AttentionSpec(
        N, N, H, H**-0.5, alibi_slopes=alibi_slopes(N), qkv_bias=True, out_bias=True
    )
    return uniform_spec(
        config,
        LayerSpec(attention, ungated(4 * D, "gelu_pytorch_tanh"), norm, norm),
        final_norm=norm,
        length=fields.max_positions(config, "seq_length", default=2048),
        embedding=EmbeddingSpec(norm=norm),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings", default=True)),
    )


FAMILIES = (
    Family(
        ("BloomForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="BLOOM 560M to 176B, BLOOMZ",
    ),
)
