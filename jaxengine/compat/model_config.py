"""What clients of vLLM read from ``llm.model_config``: a view, under its names."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from jaxengine.config import EngineConfig


@dataclasses.dataclass(frozen=True)
class ServedModelConfig:
    """The model as an engine serves it.

    Attributes:
        model: As it was given.
        tokenizer: As it was given; the model if it was not.
        dtype: Name of the compute type.
        max_model_len: Longest sequence, prompt and output.
        vocab_size: Size of the vocabulary, as the logits have it.
        hf_config: The content of config.json, by attribute.
    """

    model: str
    tokenizer: str
    revision: str | None
    seed: int
    dtype: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hf_config: Any
    max_logprobs: int
    logprobs_mode: str
    enforce_eager: bool
    skip_tokenizer_init: bool
    trust_remote_code: bool = False
    runner_type: str = "generate"
    quantization: str | None = None
    is_multimodal_model: bool = False

    @classmethod
    def of(cls, config: EngineConfig, model: Any, max_model_len: int) -> "ServedModelConfig":
        """Collect it from the engine's arguments and the model's shape (``ModelConfig``)."""
        shared = ("seed", "revision", "max_logprobs", "logprobs_mode", "enforce_eager")
        shape = ("dtype", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        return cls(
            model=config.model,
            tokenizer=config.tokenizer or config.model,
            skip_tokenizer_init=config.skip_tokenizer_init,
            max_model_len=max_model_len,
            head_dim=model.head_dim,
            hf_config=_by_attribute(model.hf_config),
            **{name: getattr(config, name) for name in shared},
            **{name: getattr(model, name) for name in shape},
        )

    @property
    def served_model_name(self) -> str:
        """The name that a server would give it."""
        return self.model

    @property
    def hf_text_config(self) -> Any:
        """The part of config.json that is about text: all of it."""
        return self.hf_config

    def get_vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.vocab_size

    def get_hidden_size(self) -> int:
        """Width of the layers' output."""
        return self.hidden_size

    def get_head_size(self) -> int:
        """Width of an attention head."""
        return self.head_dim


def _by_attribute(value: Any) -> Any:
    if isinstance(value, Mapping):
        return SimpleNamespace(**{str(k): _by_attribute(v) for k, v in value.items()})
    return value
