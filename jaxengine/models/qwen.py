"""Qwen2ForCausalLM and Qwen3ForCausalLM."""

from jaxengine.config import ModelConfig
from jaxengine.models.decoder import Decoder, DecoderSpec, ModelOptions


class Qwen2ForCausalLM(Decoder):
    """Qwen 1.5, 2 and 2.5: biases on queries, keys and values only."""

    def __init__(self, config: ModelConfig, options: ModelOptions) -> None:
        super().__init__(config, options, DecoderSpec(qkv_bias=True))


class Qwen3ForCausalLM(Decoder):
    """Qwen 3: queries and keys are normalised per head."""

    def __init__(self, config: ModelConfig, options: ModelOptions) -> None:
        has_bias = bool(config.hf_config.get("attention_bias"))
        spec = DecoderSpec(qkv_bias=has_bias, out_bias=has_bias, has_qk_norm=True)
        super().__init__(config, options, spec)
