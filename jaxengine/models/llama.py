"""LlamaForCausalLM, and Mistral, which is Llama with a sliding window in its config."""

from jaxengine.config import ModelConfig
from jaxengine.models.decoder import Decoder, DecoderSpec, ModelOptions


class LlamaForCausalLM(Decoder):
    """Llama 1 to 3.3, SmolLM, Mistral and every checkpoint of that shape."""

    def __init__(self, config: ModelConfig, options: ModelOptions) -> None:
        has_bias = bool(config.hf_config.get("attention_bias"))
        spec = DecoderSpec(
            qkv_bias=has_bias, out_bias=has_bias, mlp_bias=bool(config.hf_config.get("mlp_bias"))
        )
        super().__init__(config, options, spec)
