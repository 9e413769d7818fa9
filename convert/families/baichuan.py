"""Baichuan 1 and 2: Llama with one tensor for queries, keys and values; ALiBi in the 13B models.

The 7B models rotate, and say how long a text may be in ``max_position_embeddings``; the 13B ones
have ``model_max_length`` alone. The second generation divides each row of the output projection by
its length; its configs have ``z_loss_weight`` and a vocabulary of 125,696.
Source: the published configurations; Baichuan 2: arXiv:2309.10305, section 2.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.alibi import alibi_slopes
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention, llama_like_spec
from jaxengine.convert.model_spec import ModelSpec

LAYOUT = Layout(qkv=("self_attn.W_pack",))
BAICHUAN2_VOCABULARY = 125_696


def spec(config: Config) -> ModelSpec:
    """The spec of a BaichuanForCausalLM (once BaiChuanForCausalLM) config."""
    length = fields.max_positions(config, "max_position_embeddings", "model_max_length")
    base = llama_like_spec({**config, "max_position_embeddings": length})
    is_second = "z_loss_weight" in config or base.vocab_size == BAICHUAN2_VOCABULARY
    base = replace(base, head=replace(base.head, is_normalised=is_second))
    if config.get("max_position_embeddings") is not None:
        return base
    return each_attention(
        base,
        lambda _, own: replace(own, rope=None, alibi_slopes=alibi_slopes(own.num_heads)),
    )


FAMILIES = (
    Family(
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        spec,
        functools.partial(decoder_table, layout=LAYOUT),
        examples="Baichuan 7B and 13B, Baichuan 2 7B and 13B",
    ),
)
