"""GPTBigCode (SantaCoder, StarCoder 1): GPT-2 with one KV head, weights stored as [out, in].

Source: the configuration and the modules of transformers' GPTBigCodeModel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from jaxengine.convert.families import fields, gpt2
from jaxengine.convert.families.decoder_table import decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention
from jaxengine.convert.model_spec import ModelSpec
from jaxengine.convert.rules import Table


def spec(config: Config) -> ModelSpec:
    """The spec of a GPTBigCodeForCausalLM config."""
    base = gpt2.spec({"activation_function": "gelu_pytorch_tanh", **config})
    if not fields.flag(config, "multi_query", default=True):
        return base
    return each_attention(base, lambda _, attention: replace(attention, num_kv_heads=1))


def table(spec: ModelSpec) -> Table:
    """Where a checkpoint keeps its tensors: with a key a query, a head has its three together."""
    attention = spec.layers[0].attention
    assert attention is not None
    joined: Literal["grouped", "stacked"]
    joined = "stacked" if attention.num_kv_heads == 1 < attention.num_heads else "grouped"
    return decoder_table(spec, replace(gpt2.LAYOUT, is_transposed=False, joined=joined))


FAMILIES = (
    Family(
        ("GPTBigCodeForCausalLM",),
        spec,
        table,
        examples="StarCoder, SantaCoder, Granite 20B code",
    ),
)
