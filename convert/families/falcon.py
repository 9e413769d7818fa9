"""Falcon: one KV head and a parallel residual (7B), some KV heads (40B), or ALiBi (RW 1B).

``new_decoder_architecture`` (40B, 180B) norms the stream once for attention and once for the
feed-forward layer; without it ``parallel_attn`` shares one norm (7B) or the layer is a sequential
one (RW). The fused tensor of queries, keys and values is grouped as our parameter is.
Source: the configuration and the modules of transformers' FalconModel.
"""

from __future__ import annotations

from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.alibi import alibi_slopes
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope, stretched_length
from jaxengine.convert.model_spec import (
    AttentionSpec,
    FeedForwardSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)
from jaxengine.convert.rules import Table

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.word_embeddings",
    layer="transformer.h.{i}",
    qkv=("self_attention.query_key_value",),
    joined="grouped",
    out="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a FalconForCausalLM (once RWForCausalLM) config."""
    D = fields.integer(config, "hidden_size")
    N = fields.integer(config, "num_attention_heads", "n_head", high=fields.MAX_HEADS)
    H = fields.head_dim(config, N)
    is_new = fields.flag(config, "new_decoder_architecture")
    is_parallel = is_new or fields.flag(config, "parallel_attn", default=True)
    bias = fields.flag(config, "bias")
    norm = NormSpec(
        "layer",
        fields.number(config, "layer_norm_epsilon", default=1e-5, low=0.0),
        has_bias=True,
    )
    has_alibi = fields.flag(config, "alibi")
    K = _num_kv_heads(config, N, is_new)
    fields.check_groups(N, K)
    attention = AttentionSpec(
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        scale=H**-0.5,
        rope=None if has_alibi else read_rope(config, H),
        # Falcon scales its biases as it scales q . k.
        alibi_slopes=tuple(s * H**-0.5 for s in alibi_slopes(N)) if has_alibi else None,
        qkv_bias=bias,
        out_bias=bias,
    )
    feed_forward = FeedForwardSpec(
        fields.integer(config, "ffn_hidden_size", default=4 * D),
        fields.text(config, "activation", default="gelu"),
        is_gated=False,
        up_bias=bias,
        down_bias=bias,
    )
    norms_twice = (
        is_new and fields.integer(config, "num_ln_in_parallel_attn", default=2, high=2) == 2
    )
    layer = LayerSpec(
        attention,
        feed_forward,
        norm,
        norm if norms_twice or not is_parallel else None,
        wiring="parallel" if is_parallel else "sequential",
    )
    length = fields.max_positions(config, default=2048)
    return ModelSpec(
        architecture=config["architectures"][0],
        vocab_size=fields.vocab_size(config),
        hidden_size=D,
        max_position_embeddings=stretched_length(config, length),
        layers=(layer,) * fields.num_layers(config, "num_hidden_layers", "n_layer"),
        final_norm=norm,
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings", default=True)),
    )


def _num_kv_heads(config: Config, N: int, is_new: bool) -> int:
    """KV heads: without the new decoder a flag decides between one and one a query head."""
    if not is_new and fields.flag(config, "multi_query", default=True):
        return 1
    if not is_new:
        return N
    return fields.integer(config, "num_kv_heads", "n_head_kv", default=N, high=fields.MAX_HEADS)


def table(spec: ModelSpec) -> Table:
    """Where a checkpoint keeps its tensors: the norms' names tell how many there are."""
    layer = spec.layers[0]
    if layer.wiring == "parallel" and layer.feed_forward_norm is not None:
        return decoder_table(
            spec, replace(LAYOUT, attention_norm="ln_attn", feed_forward_norm="ln_mlp")
        )
    return decoder_table(spec, LAYOUT)


FAMILIES = (
    Family(
        ("FalconForCausalLM", "RWForCausalLM"),
        spec,
        table,
        examples="Falcon 7B, 40B, 180B, RW, Falcon 2",
    ),
)
