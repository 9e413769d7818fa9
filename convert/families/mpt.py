"""MPT: ALiBi, no biases anywhere, LayerNorms of a weight alone, queries and keys cut to a range.

Source: the published configurations, and the modules of transformers' MptModel.
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
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.blocks.{i}",
    attention_norm="norm_1",
    feed_forward_norm="norm_2",
    qkv=("attn.Wqkv",),
    out="attn.out_proj",
    gate_up=("ffn.up_proj",),
    down="ffn.down_proj",
    final_norm="transformer.norm_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of an MPTForCausalLM (in transformers MptForCausalLM) config."""
    attention_config = fields.mapping(config, "attn_config")
    _refuse_unknown(config, attention_config)
    D = fields.integer(config, "d_model")
    N = fields.integer(config, "n_heads", high=fields.MAX_HEADS)
    H = fields.head_dim(config, N)
    bias = not fields.flag(config, "no_bias", default=True)
    norm = layer_norm(config, "layer_norm_epsilon", has_bias=bias)
    has_alibi = fields.flag(attention_config, "alibi", default=True)
    attention = AttentionSpec(
        num_heads=N,
        num_kv_heads=_num_kv_heads(attention_config, N),
        head_dim=H,
        scale=fields.number(attention_config, "softmax_scale", default=H**-0.5),
        alibi_slopes=alibi_slopes(N, fields.number(attention_config, "alibi_bias_max", default=8))
        if has_alibi
        else None,
        qkv_bias=bias,
        out_bias=bias,
        # transformers reads 0 as null.
        qkv_clip=fields.number(attention_config, "clip_qkv", default=0.0, low=0.0) or None,
    )
    width = D * fields.integer(config, "expansion_ratio", default=4, high=64)
    length = fields.max_positions(config, "max_seq_len", default=2048)
    return uniform_spec(
        config,
        LayerSpec(attention, ungated(width, "gelu", bias=bias), norm, norm),
        final_norm=norm,
        length=length,
        embedding=EmbeddingSpec(num_positions=0 if has_alibi else length),
        head=HeadSpec(is_tied=True, scale=_logit_scale(config, D)),
    )


def _refuse_unknown(config: Config, attention_config: Config) -> None:
    for fields_of, name in (
        (attention_config, "qk_ln"),
        (attention_config, "prefix_lm"),
        (attention_config, "rope"),
    ):
        if fields.flag(fields_of, name):
            raise ValueError(f"config.json has attn_config.{name}=true: only false is supported")


def _num_kv_heads(attention_config: Config, N: int) -> int:
    kind = fields.text(attention_config, "attn_type", default="multihead_attention")
    if kind == "multiquery_attention":
        return 1
    if kind == "grouped_query_attention":
        K = fields.integer(attention_config, "kv_n_heads", high=fields.MAX_HEADS)
        fields.check_groups(N, K)
        return K
    return N


def _logit_scale(config: Config, D: int) -> float:
    if config.get("logit_scale") == "inv_sqrt_d_model":
        return D**-0.5
    return fields.number(config, "logit_scale", default=1.0)


FAMILIES = (
    Family(
        ("MPTForCausalLM", "MptForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="MPT 7B and 30B, StoryWriter",
    ),
)
