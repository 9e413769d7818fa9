"""GPT-J: attention and feed-forward layer side by side behind one LayerNorm, neighbours rotated.

Source: the configuration and the modules of transformers' GPTJModel.
"""

from __future__ import annotations

import functools

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope
from jaxengine.convert.families.uniform import layer_norm, ungated, uniform_spec
from jaxengine.convert.model_spec import AttentionSpec, HeadSpec, LayerSpec, ModelSpec

LAYOUT = Layout(
    prefix="transformer.",
    embedding="transformer.wte",
    layer="transformer.h.{i}",
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    out="attn.out_proj",
    gate_up=("mlp.fc_in",),
    down="mlp.fc_out",
    pairs_neighbours=True,
    final_norm="transformer.ln_f",
)


def spec(config: Config) -> ModelSpec:
    """The spec of a GPTJForCausalLM config."""
    D = fields.integer(config, "n_embd", "hidden_size")
    N = fields.integer(config, "n_head", "num_attention_heads", high=fields.MAX_HEADS)
    H = fields.head_dim(config, N)
    norm = layer_norm(config, "layer_norm_epsilon")
    attention = AttentionSpec(N, N, H, H**-0.5, rope=read_rope({"rotary_dim": H, **config}, H))
    width = fields.integer(config, "n_inner", default=4 * D)
    feed_forward = ungated(width, fields.text(config, "activation_function", default="gelu_new"))
    return uniform_spec(
        config,
        LayerSpec(attention, feed_forward, norm, None, wiring="parallel"),
        final_norm=norm,
        head=HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings"), has_bias=True),
    )


FAMILIES = (
    Family(
        ("GPTJForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="GPT-J 6B, GPT4All-J",
    ),
)
