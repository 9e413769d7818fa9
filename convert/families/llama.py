"""Llama, and all that have its shape: RMSNorm, gated feed-forward layer, rotary embedding.

Mistral has a window in every layer, whatever else its config says, and no biases. Qwen2 has
biases on queries, keys and values, which its config does not mention; Qwen2 and Qwen3 have a
window only where ``use_sliding_window`` is set, in the layers from ``max_window_layers`` on.
Qwen3 normalises each head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope, stretched_length
from jaxengine.convert.model_spec import (
    AttentionSpec,
    FeedForwardSpec,
    HeadNormSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)

LAYOUT = Layout()


def llama_like_spec(
    config: Config,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    normalises_heads: bool = False,
    windows: Sequence[int | None] | None = None,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    rotary_fraction: float = 1.0,
    norm: NormSpec | None = None,
    activation: str = "silu",
    is_gated: bool = True,
    is_tied: bool = False,
    **differences: Any,
) -> ModelSpec:
    """Return the spec of a model of Llama's shape.

    Args:
        config: Content of config.json.
        qkv_bias: Whether queries, keys and values have biases.
        out_bias: Whether attention's output has one.
        mlp_bias: Whether the feed-forward layers have.
        normalises_heads: Whether queries and keys are normalised, a head at a time.
        windows: Of each layer; None for none.
        head_dim: H where the config names none; None for hidden size / heads.
        rope_theta: The rotary embedding's base where the config names none.
        rotary_fraction: Share of a head that is rotated where the config names none.
        norm: Of the layers, the heads and the last one; None for the config's RMS norm.
        activation: Where the config names none.
        is_gated: Whether the feed-forward layers have a gate.
        is_tied: Whether input and output embeddings are one where the config does not say.
        differences: Other fields of ``ModelSpec``.

    Raises:
        ValueError: If a field is missing or makes no sense.
    """
    N, K = fields.head_counts(config)
    H = fields.head_dim(config, N, head_dim)
    norm = norm or NormSpec("rms", fields.number(config, "rms_norm_eps", default=1e-6, low=0.0))
    attention = AttentionSpec(
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        scale=H**-0.5,
        rope=read_rope(config, H, theta=rope_theta, fraction=rotary_fraction),
        head_norm=HeadNormSpec(norm) if normalises_heads else None,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    feed_forward = FeedForwardSpec(
        fields.integer(config, "intermediate_size"),
        fields.text(config, "hidden_act", default=activation),
        is_gated=is_gated,
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )
    length = fields.max_positions(config)
    num_layers = fields.num_layers(config)
    spec = {
        "architecture": config["architectures"][0],
        "vocab_size": fields.vocab_size(config),
        "hidden_size": fields.integer(config, "hidden_size"),
        "max_position_embeddings": stretched_length(config, length),
        "layers": tuple(
            LayerSpec(with_window(attention, window), feed_forward, norm, norm)
            for window in windows or (None,) * num_layers
        ),
        "final_norm": norm,
        "head": HeadSpec(is_tied=fields.flag(config, "tie_word_embeddings", default=is_tied)),
    }
    return ModelSpec(**{**spec, **differences})


def each_layer(spec: ModelSpec, change: Callable[[int, LayerSpec], LayerSpec]) -> ModelSpec:
    """The same model with each layer changed, by its number."""
    return replace(spec, layers=tuple(change(i, layer) for i, layer in enumerate(spec.layers)))


def each_attention(
    spec: ModelSpec, change: Callable[[int, AttentionSpec], AttentionSpec]
) -> ModelSpec:
    """The same model with the attention of each layer changed, by its number."""

    def changed(number: int, layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.attention, AttentionSpec)
        return replace(layer, attention=change(number, layer.attention))

    return each_layer(spec, changed)


def with_window(attention: AttentionSpec, window: int | None) -> AttentionSpec:
    """The same attention with a window; None for none."""
    return attention if window is None else replace(attention, sliding_window=window)


def llama_spec(config: Config) -> ModelSpec:
    """Llama 1 to 3.3, and what has their names.

    ``attention_qkv_bias`` and ``attention_out_bias`` are of our GGUF reader, which sees which
    biases are there.
    """
    bias = fields.flag(config, "attention_bias")
    return llama_like_spec(
        config,
        qkv_bias=fields.flag(config, "attention_qkv_bias", default=bias),
        out_bias=fields.flag(config, "attention_out_bias", default=bias),
        mlp_bias=fields.flag(config, "mlp_bias"),
    )


def mistral_spec(config: Config) -> ModelSpec:
    """Mistral 7B, whose config class has a window of 4096 where config.json has none."""
    window = config.get("sliding_window", 4096)
    if window is not None:
        window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    return llama_like_spec(config, windows=(window,) * fields.num_layers(config))


def qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Windows of Qwen2's and Qwen3's layers, as transformers reads them."""
    num_layers = fields.num_layers(config)
    if not fields.flag(config, "use_sliding_window"):
        return (None,) * num_layers
    window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    if (kinds := fields.list_of_layers(config, "layer_types", num_layers)) is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.integer(config, "max_window_layers", default=28, low=0, high=fields.MAX_LAYERS)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def qwen2_spec(config: Config) -> ModelSpec:
    """Qwen 1.5, 2 and 2.5."""
    return llama_like_spec(config, qkv_bias=True, windows=qwen_windows(config))


def qwen3_spec(config: Config) -> ModelSpec:
    """Qwen 3, dense."""
    bias = fields.flag(config, "attention_bias")
    return llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        normalises_heads=True,
        windows=qwen_windows(config),
        head_dim=128,
    )


table = functools.partial(decoder_table, layout=LAYOUT)

FAMILIES = (
    Family(
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        llama_spec,
        table,
        examples="Llama 1 to 3.3, SmolLM 1 and 2, Vicuna, Yi, DeepSeek LLM, SOLAR, TinyLlama",
    ),
    Family(
        ("MistralForCausalLM",),
        mistral_spec,
        table,
        examples="Mistral 7B, Nemo, Small, Large; Zephyr; e5-mistral",
    ),
    Family(
        ("Qwen2ForCausalLM",),
        qwen2_spec,
        table,
        examples="Qwen 1.5, 2 and 2.5; QwQ; DeepSeek-R1-Distill-Qwen",
    ),
    Family(
        ("Qwen3ForCausalLM",),
        qwen3_spec,
        table,
        examples="Qwen 3, dense",
    ),
)
