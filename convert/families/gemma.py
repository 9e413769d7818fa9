"""Gemma 1, 2 and 3: norms by ``1 + weight``, scaled embeddings, heads of 256.

Gemma 2 and 3 normalise on both sides of attention and feed-forward layer; most of their layers
have a window, in Gemma 3 with a rotary base of their own. Gemma 2 caps scores and logits, Gemma 3
normalises queries and keys instead.
Source: the configurations and modules of transformers' GemmaModel, Gemma2Model and
Gemma3TextModel.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import read_rope, stretched_length
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    HeadNormSpec,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

SANDWICH = Layout(
    feed_forward_norm="pre_feedforward_layernorm",
    attention_out_norm="post_attention_layernorm",
    feed_forward_out_norm="post_feedforward_layernorm",
)


def gemma_spec(config: Config) -> ModelSpec:
    """The first Gemma: Llama with other norms, a scaled embedding and a gate of gelu."""
    layer = _layer(config, _attention(config))
    # transformers reads hidden_act as the exact gelu only where it is named as such.
    return _model(config, (layer,) * fields.num_layers(config))


def gemma2_spec(config: Config) -> ModelSpec:
    """Gemma 2: every other layer has a window."""
    attention = replace(
        _attention(config),
        scale=fields.number(config, "query_pre_attn_scalar", default=256, low=1e-6) ** -0.5,
        logits_soft_cap=_optional(config, "attn_logit_softcapping", 50.0),
    )
    window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    layers = tuple(
        _sandwich(config, replace(attention, sliding_window=window if is_local else None))
        for is_local in local_layers(config, pattern=2)
    )
    head = HeadSpec(
        is_tied=_is_tied(config), soft_cap=_optional(config, "final_logit_softcapping", 30.0)
    )
    return _model(config, layers, head=head)  # fmt: skip


def gemma3_spec(config: Config) -> ModelSpec:
    """Gemma 3, text: five layers in six have a window and a rotary base of their own."""
    base = _attention(config)
    H = base.head_dim
    norm = _norm(config)
    shared = replace(
        base,
        scale=fields.number(config, "query_pre_attn_scalar", default=256, low=1e-6) ** -0.5,
        head_norm=HeadNormSpec(norm),
        logits_soft_cap=_optional(config, "attn_logit_softcapping", None),
    )
    window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    everywhere = replace(shared, rope=read_rope(config, H, theta=1_000_000.0))
    local = replace(shared, rope=_local_rope(config, H), sliding_window=window)
    layers = tuple(
        _sandwich(config, local if is_local else everywhere)
        for is_local in local_layers(config, pattern=6)
    )
    head = HeadSpec(
        is_tied=_is_tied(config), soft_cap=_optional(config, "final_logit_softcapping", None)
    )
    return _model(config, layers, head=head, stretches=False)  # fmt: skip


def local_layers(config: Config, pattern: int) -> list[bool]:
    """Which layers have the window: of each ``pattern`` layers all but the last."""
    num_layers = fields.num_layers(config)
    if (kinds := fields.list_of_layers(config, "layer_types", num_layers)) is not None:
        return [kind == "sliding_attention" for kind in kinds]
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    pattern = fields.integer(config, *names, default=pattern, high=fields.MAX_LAYERS)
    return [bool((layer + 1) % pattern) for layer in range(num_layers)]


def _local_rope(config: Config, H: int) -> RopeSpec:
    """Layers with a window are never scaled, and have a base of their own."""
    if (
        isinstance(config.get("rope_parameters"), dict)
        and "sliding_attention" in config["rope_parameters"]
    ):
        return read_rope(config, H, layer_type="sliding_attention")
    theta = fields.number(config, "rope_local_base_freq", default=10000.0, low=1e-3)
    return read_rope({"rope_theta": theta}, H)


def _norm(config: Config) -> NormSpec:
    eps = fields.number(config, "rms_norm_eps", default=1e-6, low=0.0)
    return NormSpec("rms", eps, offset=1.0)


def _attention(config: Config) -> AttentionSpec:
    N, K = fields.head_counts(config)
    H = fields.head_dim(config, N, 256)
    bias = fields.flag(config, "attention_bias")
    rope = read_rope(config, H)
    return AttentionSpec(N, K, H, H**-0.5, rope=rope, qkv_bias=bias, out_bias=bias)


def _layer(config: Config, attention: AttentionSpec) -> LayerSpec:
    activation = fields.text(config, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    if activation == "gelu" and config.get("hidden_activation") is None:
        activation = "gelu_pytorch_tanh"  # what the first checkpoints meant by it
    feed_forward = FeedForwardSpec(fields.integer(config, "intermediate_size"), activation)
    return LayerSpec(attention, feed_forward, _norm(config), _norm(config))


def _sandwich(config: Config, attention: AttentionSpec) -> LayerSpec:
    norm = _norm(config)
    return replace(_layer(config, attention), attention_out_norm=norm, feed_forward_out_norm=norm)


def _model(
    config: Config,
    layers: tuple[LayerSpec, ...],
    *,
    head: HeadSpec | None = None,
    stretches: bool = True,
) -> ModelSpec:
    length = fields.max_positions(config)
    D = fields.integer(config, "hidden_size")
    return ModelSpec(
        architecture=config["architectures"][0],
        vocab_size=fields.vocab_size(config),
        hidden_size=D,
        max_position_embeddings=stretched_length(config, length) if stretches else length,
        layers=layers,
        final_norm=_norm(config),
        embedding=EmbeddingSpec(scale=D**0.5),
        head=head or HeadSpec(is_tied=_is_tied(config)),
    )


def _is_tied(config: Config) -> bool:
    return fields.flag(config, "tie_word_embeddings", default=True)


def _optional(config: Config, name: str, default: float | None) -> float | None:
    """A number that null switches off, where the family has a default of its own."""
    if name in config and config[name] is None:
        return None
    return fields.number(config, name, default=default, low=1e-6)


FAMILIES = (
    Family(
        ("GemmaForCausalLM",),
        gemma_spec,
        functools.partial(decoder_table, layout=Layout()),
        examples="Gemma 1, CodeGemma",
    ),
    Family(
        ("Gemma2ForCausalLM",),
        gemma2_spec,
        functools.partial(decoder_table, layout=SANDWICH),
        examples="Gemma 2",
    ),
    Family(
        ("Gemma3ForCausalLM", "Gemma3TextModel"),
        gemma3_spec,
        functools.partial(decoder_table, layout=SANDWICH),
        examples="Gemma 3 270M and 1B",
    ),
)
