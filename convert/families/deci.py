"""DeciLM: Llama whose layers differ in their number of KV heads, or lack a part.

DeciLM-7B lists KV heads a layer; Nemotron's models of the same name (found by architecture search)
list blocks, where attention or feed-forward layer may be missing or of another width.
Source: their published configurations.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxengine.convert.families import fields, llama
from jaxengine.convert.families.decoder_table import decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The spec of a DeciLMForCausalLM config."""
    num_layers = fields.num_layers(config)
    blocks = fields.list_of_layers(config, "block_configs", num_layers)
    if blocks is not None:
        default_width = {"intermediate_size": 1}  # each block has its own
        base = llama.llama_spec({**default_width, "num_key_value_heads": None, **_known(config)})
        return replace(
            base,
            layers=tuple(
                _block(config, layer, block, number)
                for number, (layer, block) in enumerate(zip(base.layers, blocks, strict=True))
            ),
        )
    base = llama.llama_spec(config)
    counts = fields.list_of_layers(config, "num_key_value_heads_per_layer", num_layers)
    if counts is None:
        return base
    name = "num_key_value_heads_per_layer"
    checked = [fields.integer({name: count}, name, high=fields.MAX_HEADS) for count in counts]
    return replace(base, layers=tuple(map(_with_kv_heads, base.layers, checked)))


def _known(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


def _with_kv_heads(layer: LayerSpec, num_kv_heads: int) -> LayerSpec:
    assert isinstance(layer.attention, AttentionSpec)
    fields.check_groups(layer.attention.num_heads, num_kv_heads)
    return replace(layer, attention=replace(layer.attention, num_kv_heads=num_kv_heads))


def _block(config: Config, layer: LayerSpec, block: Any, number: int) -> LayerSpec:
    if not isinstance(block, Mapping):
        raise ValueError(f"config.json has block_configs[{number}]={block!r}: an object is needed")
    attention = fields.mapping(block, "attention")
    feed_forward = fields.mapping(block, "ffn")
    for name, part in (("attention", attention), ("ffn", feed_forward)):
        if fields.flag(part, "replace_with_linear"):
            raise ValueError(
                f"config.json has block_configs[{number}].{name}.replace_with_linear: linear "
                "stand-ins are not supported, only no_op"
            )
    if fields.flag(attention, "no_op"):
        layer = replace(layer, attention=None, attention_norm=None)
    else:
        group = fields.integer(attention, "n_heads_in_group", high=fields.MAX_HEADS)
        assert layer.attention is not None
        fields.check_groups(layer.attention.num_heads, group)
        layer = _with_kv_heads(layer, layer.attention.num_heads // group)
    if fields.flag(feed_forward, "no_op"):
        return replace(layer, feed_forward=None, feed_forward_norm=None)
    assert isinstance(layer.feed_forward, FeedForwardSpec)
    width = _width(config, feed_forward)
    return replace(layer, feed_forward=replace(layer.feed_forward, intermediate_size=width))


def _width(config: Config, feed_forward: Config) -> int:
    """Two thirds of the multiplier times the hidden size, up to the next multiple of 256."""
    if feed_forward.get("intermediate_size") is not None:
        return fields.integer(feed_forward, "intermediate_size")
    multiplier = fields.number(feed_forward, "ffn_mult", low=1e-3, high=1e3)
    width = int(2 * multiplier * fields.integer(config, "hidden_size") / 3)
    return -(-width // 256) * 256


FAMILIES = (
    Family(
        ("DeciLMForCausalLM",),
        spec,
        functools.partial(decoder_table, layout=llama.LAYOUT),
        examples="DeciLM 6B and 7B, Nemotron 49B, 51B and 253B",
    ),
)
