"""Qwen3: Llama's table with a norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace

from jaxengine.convert import llama
from jaxengine.convert.rules import Config, Table, same


def rules(config: Config) -> Table:
    """The table for a Qwen3ForCausalLM config."""
    # transformers gives Qwen3 a head_dim of 128 where the config does not say.
    config = {"head_dim": 128, **config}
    base = llama.table(config, attention_bias=bool(config.get("attention_bias")))
    norms = (
        same(
            f"layers.{{i}}.attention.{letter}_norm.weight",
            f"{llama.ATTENTION}.{letter}_norm.weight",
            (config["head_dim"],),
        )
        for letter in ("q", "k")
    )
    return replace(base, rules=(*base.rules, *norms))
