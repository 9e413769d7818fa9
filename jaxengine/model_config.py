"""The model that an engine serves: its spec, and what is decided beside it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxengine.convert.errors import shown
from jaxengine.convert.families import model_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LatentAttentionSpec,
    ModelSpec,
    RopeSpec,
)
from jaxengine.convert.quantised import quantisation_of

DTYPES = ("bfloat16", "float16", "float32")

# Other spellings of ``dtype`` that users of vLLM type.
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's spec, the type it is served in, and the tokens that end its outputs.

    Attributes:
        spec: Its family's facts.
        dtype: Type of weights and activations.
        eos_token_ids: Those of config.json.
        hf_config: The whole config.json, overrides applied: for messages, never for the model.
    """

    spec: ModelSpec
    dtype: str
    eos_token_ids: tuple[int, ...]
    hf_config: Mapping[str, Any] = dataclasses.field(hash=False, repr=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], dtype: str = "auto") -> "ModelConfig":
        """Translate the content of an HF ``config.json``.

        Raises:
            ValueError: If the architecture, the quantisation or the dtype is not supported, or a
                field is missing or makes no sense.
        """
        quantisation_of(hf)
        return cls(
            spec=model_spec(hf),
            dtype=resolve_dtype(dtype, _found(hf, "dtype") or _found(hf, "torch_dtype")),
            eos_token_ids=_as_ids(_found(hf, "eos_token_id")),
            hf_config=dict(hf),
        )

    @property
    def architecture(self) -> str:
        """Hugging Face's name of the model's class."""
        return self.spec.architecture

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.spec.vocab_size

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.spec.hidden_size

    @property
    def num_layers(self) -> int:
        """L."""
        return self.spec.num_layers

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence that the model was made for."""
        return self.spec.max_position_embeddings

    @property
    def attention(self) -> AttentionSpec | LatentAttentionSpec:
        """The widest attention of a layer, which those who estimate sizes take for all."""
        return max(self._attentions, key=lambda a: (a.num_kv_heads * a.head_dim, a.num_heads))

    @property
    def num_heads(self) -> int:
        """N."""
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """K, of the layer that has most."""
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.attention.head_dim

    @property
    def rope(self) -> RopeSpec | None:
        """The rotary embedding of the last layer, which sees everything where any does."""
        return self._attentions[-1].rope

    @property
    def intermediate_size(self) -> int:
        """F, of the layer that is widest and serves every token; 0 if there is none."""
        parts = [layer.feed_forward for layer in self.spec.layers]
        parts += [part.shared for part in parts if isinstance(part, ExpertsSpec)]
        widths = [part.intermediate_size for part in parts if isinstance(part, FeedForwardSpec)]
        return max(widths, default=0)

    @property
    def mixtures(self) -> tuple[ExpertsSpec, ...]:
        """Those that the layers have, each once."""
        parts = (layer.feed_forward for layer in self.spec.layers)
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, ExpertsSpec)))

    @property
    def activation_size(self) -> int:
        """Numbers that a token needs at the widest place of a layer, about."""
        experts = [
            mixture.num_experts_per_token * (2 * mixture.intermediate_size + self.hidden_size)
            for mixture in self.mixtures
        ]
        return 3 * self.intermediate_size + 2 * self.hidden_size + max(experts, default=0)

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """The window of each layer that has attention; None for full attention."""
        return tuple(attention.sliding_window for attention in self._attentions)

    @property
    def uniform_sliding_window(self) -> int | None:
        """The window that every layer has; None if any layer sees everything."""
        windows = set(self.sliding_windows)
        return windows.pop() if len(windows) == 1 else None

    @property
    def _attentions(self) -> list[AttentionSpec | LatentAttentionSpec]:
        return [layer.attention for layer in self.spec.layers if layer.attention is not None]


def _found(hf: Mapping[str, Any], name: str) -> Any:
    """A field of the config, or of the language model's where it is one of several."""
    value = hf.get(name)
    text = hf.get("text_config")
    return text.get(name) if value is None and isinstance(text, Mapping) else value


def _as_ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token_id in values:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"config.json has eos_token_id={shown(value)}: token ids are integers")
    return tuple(values)


def resolve_dtype(requested: str, stored: str | None) -> str:
    """Choose the compute dtype: what was asked for, or for ``auto`` what the checkpoint stores.

    ``auto`` keeps bfloat16, float16 and float32 as they are stored.

    Raises:
        ValueError: If the dtype is not one of ``DTYPES``.
    """
    is_stored = requested == "auto"
    wanted = str(stored or "bfloat16").removeprefix("torch.") if is_stored else requested
    wanted = _DTYPE_ALIASES.get(wanted, wanted)
    if wanted not in DTYPES:
        where = "config.json: " if is_stored else ""
        raise ValueError(
            f"{where}dtype {shown(wanted)} is not supported: use one of auto, {', '.join(DTYPES)}"
        )
    return wanted
