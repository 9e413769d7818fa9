"""OPT: learned positions that begin at row 2, ReLU, biases; in 350m norms behind the sums.

There the token embeddings are narrower than the residual stream, with a projection on both ends.
Source: the configuration and the modules of transformers' OPTModel; arXiv:2205.01068.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.uniform import ungated, uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    Wiring,
)

LAYOUT = Layout(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layer="model.decoder.layers.{i}",
    attention_norm="self_attn_layer_norm",
    feed_forward_norm="final_layer_norm",
    out="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
    final_norm="model.decoder.final_layer_norm",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
)


def spec(config: Config) -> ModelSpec:
    """The spec of an OPTForCausalLM config."""
    D = fields.integer(config, "hidden_size")
    N = fields.integer(config, "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.head_dim(config, N)
    bias = fields.flag(config, "enable_bias", default=True)
    is_affine = fields.flag(config, "layer_norm_elementwise_affine", default=True)
    norm = NormSpec("layer", 1e-5, has_weight=is_affine, has_bias=is_affine)
    attention = AttentionSpec(N, N, H, H**-0.5, qkv_bias=bias, out_bias=bias)
    activation = fields.text(config, "activation_function", default="relu")
    feed_forward = ungated(fields.integer(config, "ffn_dim"), activation, bias=bias)
    comes_first = fields.flag(config, "do_layer_norm_before", default=True)
    wiring: Wiring = "sequential" if comes_first else "post"
    has_final_norm = comes_first and not fields.flag(config, "_remove_final_layer_norm")
    length = fields.max_positions(config)
    size = fields.integer(config, "word_embed_proj_dim", default=D)
    return uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, norm, wiring=wiring),
        final_norm=norm if has_final_norm else None,
        embedding=EmbeddingSpec(
            num_positions=length, position_offset=2, size=None if size == D else size
        ),
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings", default=True)),
    )


FAMILIES = (
    Family(
        ("OPTForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="OPT 125M to 66B, Galactica",
    ),
)
