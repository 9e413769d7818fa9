"""Reads model checkpoints of any format, and writes them as Orbax checkpoints of our tree."""

from jaxengine.convert import llama, mistral, qwen2, qwen3
from jaxengine.convert.checkpoint import Checkpoint
from jaxengine.convert.parameters import Parameter, parameters
from jaxengine.convert.readers import open_checkpoint
from jaxengine.convert.rules import register_family
from jaxengine.convert.save import ConversionSummary, convert_checkpoint

__all__ = [
    "Checkpoint",
    "ConversionSummary",
    "Parameter",
    "convert_checkpoint",
    "open_checkpoint",
    "parameters",
    "register_family",
]

register_family("LlamaForCausalLM", llama.rules)
register_family("MistralForCausalLM", mistral.rules)
register_family("Qwen2ForCausalLM", qwen2.rules)
register_family("Qwen3ForCausalLM", qwen3.rules)
