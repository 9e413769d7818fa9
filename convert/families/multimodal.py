"""The language models of checkpoints that see images too: text in, text out.

Their config.json holds the language model's in ``text_config`` (Qwen's first ones have it beside
the others), where what equals the default of its class may be left out. Names of tensors have one
of three beginnings, by age; the image encoder and what lies between are not read.
Sources: the configurations of transformers' classes, and the published checkpoints.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxengine.convert.families import fields, gemma, llama, llama_variants
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import ModelSpec

AROUND: dict[str, Any] = {
    "renamed": (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    "unused": tuple(
        f"{prefix}{part}"
        for prefix in ("", "model.")
        for part in ("vision_tower.", "visual.", "multi_modal_projector.", "image_newline")
    ),
}

# By ``model_type`` of the text: its family, and what its class has where a config says nothing.
_LANGUAGE_MODELS: dict[str, tuple[Callable[[Config], ModelSpec], dict[str, Any]]] = {
    "gemma3_text": (
        gemma.gemma3_spec,
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
        },
    ),
    "llama": (
        llama.llama_spec,
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "mistral": (
        llama.mistral_spec,
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
        },
    ),
    "ministral3": (llama_variants.ministral3_spec, {}),
    "qwen2": (llama.qwen2_spec, {}),
    "qwen3": (llama.qwen3_spec, {}),
}
# Other names of them: with sections of positions for images, which text does not need.
_ALIASES = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}


def spec(config: Config) -> ModelSpec:
    """The spec of the language model of a config.

    Raises:
        ValueError: If there is none, or one that is not supported.
    """
    architecture = config["architectures"][0]
    text = fields.mapping(config, "text_config") or config
    kind = fields.text(text, "model_type", default="")
    kind = _ALIASES.get(kind, kind)
    if kind not in _LANGUAGE_MODELS:
        raise ValueError(
            f"{architecture} has a language model of type {kind!r}: supported are "
            f"{', '.join(_LANGUAGE_MODELS)}"
        )
    warnings.warn(f"{architecture}: its language model is served; images are refused", stacklevel=2)
    make, defaults = _LANGUAGE_MODELS[kind]
    outer = {"tie_word_embeddings": config.get("tie_word_embeddings")}
    said = {
        name: value
        for name, value in text.items()
        if value is not None or name not in {**defaults, **outer}
    }
    return make({**defaults, **outer, **said, "architectures": [architecture]})


table = functools.partial(decoder_table, layout=Layout(**AROUND))
sandwich_table = functools.partial(decoder_table, layout=replace(gemma.SANDWICH, **AROUND))

FAMILIES = (
    Family(
        ("Gemma3ForConditionalGeneration",),
        spec,
        sandwich_table,
        examples="Gemma 3 4B, 12B, 27B, as text",
    ),
    Family(
        (
            "Mistral3ForConditionalGeneration",
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
        ),
        spec,
        table,
        examples="Mistral Small 3.1, Pixtral, LLaVA 1.5 and NeXT, Qwen 2 and 2.5 VL, as text",
    ),
    Family(
        ("Qwen3VLForConditionalGeneration",),
        spec,
        table,
        examples="Qwen 3 VL, dense, as text",
    ),
)
