"""Qwen2: Llama's table with biases on q, k and v, which its config does not mention."""

from __future__ import annotations

from dataclasses import replace

from jaxengine.convert import llama
from jaxengine.convert.rules import Config, Table


def rules(config: Config) -> Table:
    """The table for a Qwen2ForCausalLM config."""
    base = llama.table(config, attention_bias=False)
    H, G, K = llama.head_sizes(config)
    bias = llama.qkv(K, G, H, "bias", ())
    return replace(
        base, rules=tuple(bias if rule.path == bias.path else rule for rule in base.rules)
    )
