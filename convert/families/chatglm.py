"""ChatGLM 2, ChatGLM 3 and GLM 4 in the layout that they were first published in.

Two KV heads, RMS norms, a joined gate and up, and a rotary embedding of half of each head in
neighbouring pairs. The first ChatGLM is another model, with positions in two dimensions.
Source: the published configurations and model descriptions; arXiv:2406.12793.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.uniform import uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    FeedForwardSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.embedding.word_embeddings",
    layer="transformer.encoder.layers.{i}",
    qkv=("self_attention.query_key_value",),
    out="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    pairs_neighbours=True,
    final_norm="transformer.encoder.final_layernorm",
    head="transformer.output_layer",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a ChatGLMModel config (also ChatGLMForConditionalGeneration)."""
    _refuse_unknown(config)
    N = fields.integer(config, "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.integer(config, "kv_channels", default=128, high=fields.MAX_HEAD_DIM)
    K = fields.integer(config, "multi_query_group_num", default=1, high=fields.MAX_HEADS)
    fields.check_groups(N, K)
    eps = fields.number(config, "layernorm_epsilon", default=1e-5, low=0.0)
    norm = NormSpec("rms" if fields.flag(config, "rmsnorm", default=True) else "layer", eps)
    theta = 10000.0 * fields.number(config, "rope_ratio", default=1.0, low=1e-3)
    bias = fields.flag(config, "add_bias_linear")
    attention = AttentionSpec(
        N,
        K,
        H,
        H**-0.5,
        rope=RopeSpec(H // 2, theta),
        qkv_bias=bias or fields.flag(config, "add_qkv_bias"),
        out_bias=bias,
    )
    width = fields.integer(config, "ffn_hidden_size")
    feed_forward = FeedForwardSpec(width, "silu", up_bias=bias, down_bias=bias)
    has_final_norm = fields.flag(config, "post_layer_norm", default=True)
    names = {
        "vocab_size": fields.vocab_size(config, "padded_vocab_size", "vocab_size"),
        "num_hidden_layers": fields.num_layers(config, "num_layers", "num_hidden_layers"),
    }
    return uniform_spec(
        {**config, **names},
        LayerSpec(attention, feed_forward, norm, norm),
        final_norm=norm if has_final_norm else None,
        length=fields.max_positions(config, "seq_length", default=2048),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings")),
    )


def _refuse_unknown(config: Config) -> None:
    if config.get("position_encoding_2d") is not None or "ffn_hidden_size" not in config:
        raise ValueError(
            "config.json is one of the first ChatGLM, which is not supported: ChatGLM2, ChatGLM3 "
            "and GLM-4 are"
        )
    for name, expected in (
        ("multi_query_attention", True),
        ("apply_residual_connection_post_layernorm", False),
        ("original_rope", True),
    ):
        if fields.flag(config, name, default=expected) is not expected:
            raise ValueError(
                f"config.json has {name}={not expected}: only {expected} is supported, which all "
                "published models have"
            )


FAMILIES = (
    Family(
        ("ChatGLMModel", "ChatGLMForConditionalGeneration", "ChatGLMForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="ChatGLM2 6B, ChatGLM3 6B, CodeGeeX 2, GLM-4 9B as first published",
    ),
)
