"""Mistral: Llama's table; its sliding window is the model's affair."""

from __future__ import annotations

from jaxengine.convert import llama
from jaxengine.convert.rules import Config, Table


def rules(config: Config) -> Table:
    """The table for a MistralForCausalLM config."""
    return llama.table(config, attention_bias=False)
