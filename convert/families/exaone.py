"""EXAONE 3 and 4: Llama under GPT-2's names; then norms behind each part, windows, head norms.

Source: the published configurations (3), and transformers' Exaone4Model.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.llama import each_attention, each_layer, llama_like_spec
from jaxengine.convert.families.olmo import BEHIND, norms_behind
from jaxengine.convert.model_spec import AttentionSpec, ModelSpec, NormSpec

EXAONE3 = Layout(
    prefix="transformer.",
    embedding="transformer.wte",
    layer="transformer.h.{i}",
    attention_norm="ln_1",
    feed_forward_norm="ln_2",
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    out="attn.attention.out_proj",
    gate_up=("mlp.c_fc_0", "mlp.c_fc_1"),
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)


def exaone3_spec(config: Config) -> ModelSpec:
    """EXAONE 3.0, 3.5 and Deep, whose configs have names of their own."""
    names = {
        "num_hidden_layers": config.get("num_layers", config.get("num_hidden_layers")),
        "hidden_act": config.get("activation_function", "silu"),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }
    return llama_like_spec({**config, **names})


def exaone4_spec(config: Config) -> ModelSpec:
    """EXAONE 4: where some layers have a window, those without one know no positions."""
    norm = NormSpec("rms", fields.number(config, "rms_norm_eps", default=1e-5, low=0.0))
    base = llama_like_spec(config, norm=norm, normalises_heads=True)
    base = each_layer(base, lambda _, layer: norms_behind(layer))
    if "sliding_window" in config and config["sliding_window"] is None:
        return base
    window = fields.integer(config, "sliding_window", default=4096, high=fields.MAX_LENGTH)
    is_local = _local_layers(config, base.num_layers)

    def changed(number: int, attention: AttentionSpec) -> AttentionSpec:
        if is_local[number]:
            return replace(attention, sliding_window=window)
        return replace(attention, rope=None)

    return each_attention(base, changed)


def _local_layers(config: Config, num_layers: int) -> list[bool]:
    """Which layers have the window: as listed, or by a pattern such as "LLLG" or 4."""
    if (kinds := fields.list_of_layers(config, "layer_types", num_layers)) is not None:
        return [kind == "sliding_attention" for kind in kinds]
    pattern = config.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        is_local = [pattern[layer % len(pattern)] == "L" for layer in range(num_layers)]
        return [*is_local[:-1], False]  # the last one sees everything, whatever the pattern
    period = fields.integer(config, "sliding_window_pattern", default=4, high=fields.MAX_LAYERS)
    return [bool((layer + 1) % period) for layer in range(num_layers)]


FAMILIES = (
    Family(
        ("ExaoneForCausalLM",),
        exaone3_spec,
        functools.partial(decoder_table, layout=EXAONE3),
        examples="EXAONE 3.0, 3.5, Deep",
    ),
    Family(
        ("Exaone4ForCausalLM",),
        exaone4_spec,
        functools.partial(decoder_table, layout=BEHIND),
        examples="EXAONE 4.0 1.2B and 32B",
    ),
)
