"""Families that are Llama but for a fact or two, each a function of a few lines.

Sources: their published configurations, and transformers' modules where it has them.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import (
    each_attention,
    each_layer,
    llama_like_spec,
    llama_spec,
)
from jaxengine.convert.families.rope import rope_parameters
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    ModelSpec,
    NormSpec,
)


def arcee_spec(config: Config) -> ModelSpec:
    """Arcee: a feed-forward layer without a gate, of squared ReLU."""
    bias = fields.flag(config, "attention_bias")
    return llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag(config, "mlp_bias"),
        activation="relu2",
        is_gated=False,
    )


def seed_oss_spec(config: Config) -> ModelSpec:
    """Seed-OSS: biases on queries, keys and values, and one of its own for the output."""
    return llama_like_spec(
        config,
        qkv_bias=fields.flag(config, "attention_bias", default=True),
        out_bias=fields.flag(config, "attention_out_bias"),
        mlp_bias=fields.flag(config, "mlp_bias"),
        head_dim=128,
    )


def orion_spec(config: Config) -> ModelSpec:
    """Orion: LayerNorm with biases, though the config speaks of RMS."""
    eps = fields.number(config, "rms_norm_eps", default=1e-5, low=0.0)
    return llama_like_spec(config, norm=NormSpec("layer", eps, has_bias=True))


def ernie_spec(config: Config) -> ModelSpec:
    """Ernie 4.5, dense: one flag for all biases."""
    bias = fields.flag(config, "use_bias")
    return llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        head_dim=None if config.get("head_dim") is not None else 128,
        rope_theta=500_000.0,
        is_tied=True,
    )


def helium_spec(config: Config) -> ModelSpec:
    """Helium: Llama whose rotary embedding pairs neighbours."""
    return llama_like_spec(config, head_dim=128, rope_theta=100_000.0)


def ministral_spec(config: Config) -> ModelSpec:
    """Ministral: Mistral with a window in the layers that ``layer_types`` names."""
    num_layers = fields.num_layers(config)
    window = config.get("sliding_window", 4096)
    if window is not None:
        window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    kinds = fields.list_of_layers(config, "layer_types", num_layers)
    windows = (
        tuple(window if kind == "sliding_attention" else None for kind in kinds)
        if kinds
        else (window,) * num_layers
    )
    return llama_like_spec(config, windows=windows)


def ministral3_spec(config: Config) -> ModelSpec:
    """Ministral 3, as far as its queries are not scaled by their position.

    That begins at the original length, to which the model's is therefore cut.
    """
    base = llama_like_spec(config, head_dim=128)
    scaling = rope_parameters(config)
    if scaling.get("llama_4_scaling_beta") is None:
        return base
    length = fields.integer(
        scaling, "original_max_position_embeddings", default=16384, high=fields.MAX_LENGTH
    )
    return replace(base, max_position_embeddings=min(length, base.max_position_embeddings))


def cwm_spec(config: Config) -> ModelSpec:
    """CWM: a window in three layers of four, beginning with one that sees everything."""
    num_layers = fields.num_layers(config)
    window = fields.integer(config, "sliding_window", default=8192, high=fields.MAX_LENGTH)
    kinds = fields.list_of_layers(config, "layer_types", num_layers)
    is_local = [k == "sliding_attention" for k in kinds] if kinds else [
        layer % 4 != 0 for layer in range(num_layers)
    ]  # fmt: skip
    windows = tuple(window if local else None for local in is_local)
    return llama_like_spec(config, windows=windows, head_dim=128, rope_theta=1_000_000.0)


def smollm3_spec(config: Config) -> ModelSpec:
    """SmolLM 3: no rotation in every fourth layer (or where ``no_rope_layers`` has a 0)."""
    num_layers = fields.num_layers(config)
    interval = fields.integer(config, "no_rope_layer_interval", default=4, high=fields.MAX_LAYERS)
    turns = fields.list_of_layers(config, "no_rope_layers", num_layers) or [
        (layer + 1) % interval for layer in range(num_layers)
    ]
    window = None
    if fields.flag(config, "use_sliding_window") and config.get("sliding_window") is not None:
        window = fields.integer(config, "sliding_window", high=fields.MAX_LENGTH)
    kinds = fields.list_of_layers(config, "layer_types", num_layers) or [
        "full_attention" if turn else "sliding_attention" for turn in turns
    ]
    bias = fields.flag(config, "attention_bias")
    base = llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag(config, "mlp_bias"),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        rope_theta=2_000_000.0,
        is_tied=True,
    )

    def changed(number: int, attention: AttentionSpec) -> AttentionSpec:
        return attention if turns[number] else replace(attention, rope=None)

    return each_attention(base, changed)


def granite_spec(config: Config) -> ModelSpec:
    """Granite 3: four multipliers, of embeddings, residuals, scores and logits."""
    base = llama_spec(config)
    scale = fields.number(config, "attention_multiplier", default=1.0)
    residual = fields.number(config, "residual_multiplier", default=1.0)
    embedding = fields.number(config, "embedding_multiplier", default=1.0)
    divisor = fields.number(config, "logits_scaling", default=1.0, low=1e-6)
    base = each_attention(base, lambda _, attention: replace(attention, scale=scale))
    base = each_layer(base, lambda _, layer: replace(layer, residual_scale=residual))
    return replace(
        base,
        embedding=EmbeddingSpec(scale=embedding),
        head=replace(base.head, scale=1 / divisor),
    )


def minicpm_spec(config: Config) -> ModelSpec:
    """MiniCPM 1, 2 and 4: embeddings, residuals and logits scaled by width and depth."""
    base = llama_like_spec(config)
    depth = fields.number(config, "scale_depth", default=1.0, low=0.0)
    width = fields.number(config, "dim_model_base", default=base.hidden_size, low=1.0)
    residual = depth / base.num_layers**0.5
    base = each_layer(base, lambda _, layer: replace(layer, residual_scale=residual))
    return replace(
        base,
        embedding=EmbeddingSpec(scale=fields.number(config, "scale_emb", default=1.0)),
        # Its first configs do not say that they are tied, as their class does.
        head=HeadSpec(
            is_tied=fields.flag(config, "tie_word_embeddings", default=True),
            scale=width / base.hidden_size,
        ),
    )


table = functools.partial(decoder_table, layout=Layout())
paired_table = functools.partial(decoder_table, layout=Layout(pairs_neighbours=True))
yi_table = functools.partial(
    decoder_table, layout=Layout(attention_norm="ln1", feed_forward_norm="ln2")
)
ungated_table = functools.partial(decoder_table, layout=Layout(gate_up=("mlp.up_proj",)))

FAMILIES = (
    Family(
        ("AquilaForCausalLM", "AquilaModel"),
        llama_spec,
        table,
        examples="Aquila 7B, Aquila 2",
    ),
    Family(
        ("XverseForCausalLM",),
        llama_spec,
        table,
        examples="XVERSE 7B, 13B, 65B",
    ),
    Family(
        ("YiForCausalLM",),
        llama_spec,
        yi_table,
        examples="Yi as first published",
    ),
    Family(
        ("ArceeForCausalLM",),
        arcee_spec,
        ungated_table,
        examples="AFM 4.5B",
    ),
    Family(
        ("SeedOssForCausalLM",),
        seed_oss_spec,
        table,
        examples="Seed-OSS 36B",
    ),
    Family(
        ("OrionForCausalLM",),
        orion_spec,
        table,
        examples="Orion 14B",
    ),
    Family(
        ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        ernie_spec,
        paired_table,
        examples="ERNIE 4.5 0.3B",
    ),
    Family(
        ("HeliumForCausalLM",),
        helium_spec,
        paired_table,
        examples="Helium 1 2B",
    ),
    Family(
        ("MinistralForCausalLM",),
        ministral_spec,
        table,
        examples="Ministral 8B",
    ),
    Family(
        ("Ministral3ForCausalLM",),
        ministral3_spec,
        table,
        examples="Ministral 3 3B to 14B, up to their original length",
    ),
    Family(
        ("CwmForCausalLM",),
        cwm_spec,
        table,
        examples="Code World Model 32B",
    ),
    Family(
        ("SmolLM3ForCausalLM",),
        smollm3_spec,
        table,
        examples="SmolLM 3 3B",
    ),
    Family(
        ("GraniteForCausalLM",),
        granite_spec,
        table,
        examples="Granite 3.0 to 3.3, 2B and 8B",
    ),
    Family(
        ("MiniCPMForCausalLM",),
        minicpm_spec,
        table,
        examples="MiniCPM 1B, 2B; MiniCPM 4",
    ),
)
