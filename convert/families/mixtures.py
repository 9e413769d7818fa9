"""Models of Llama's shape whose feed-forward layers are mixtures: Mixtral, Qwen 2 and 3, OLMoE.

Source: their configurations and modules in transformers.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxengine.convert.families import fields, llama
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.experts_table import SEPARATE, ExpertsLayout
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.mixture_fields import mixture_spec, sparse_layers, with_mixtures
from jaxengine.convert.model_spec import FeedForwardSpec, HeadNormSpec, ModelSpec, RouterSpec

# The names that Mixtral began with.
BLOCK_SPARSE = ExpertsLayout(
    router="block_sparse_moe.gate",
    gate_up=(
        "block_sparse_moe.experts.{e}.w1.weight",
        "block_sparse_moe.experts.{e}.w3.weight",
    ),
    down="block_sparse_moe.experts.{e}.w2.weight",
)
QWEN_EXPERTS = ExpertsLayout(
    shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    shared_down="mlp.shared_expert.down_proj",
    shared_gate="mlp.shared_expert_gate",
)


def mixtral_spec(config: Config) -> ModelSpec:
    """The spec of a MixtralForCausalLM config."""
    config = {"rms_norm_eps": 1e-5, **config}
    window = fields.window(config)
    num_layers = fields.num_layers(config)
    base = llama.llama_like_spec(config, windows=(window,) * num_layers, rope_theta=1e6)
    mixture = mixture_spec(
        config,
        router=RouterSpec(is_normalised=True),
        num_experts=8,
        num_chosen=2,
        width="intermediate_size",
    )
    return with_mixtures(base, mixture)


def qwen2_spec(config: Config) -> ModelSpec:
    """The spec of a Qwen2MoeForCausalLM config: Qwen 1.5 and 2."""
    base = llama.llama_like_spec(
        config,
        qkv_bias=fields.flag(config, "qkv_bias", default=True),
        windows=llama.qwen_windows(config),
    )
    width = fields.integer(config, "shared_expert_intermediate_size", default=5632)
    activation = fields.text(config, "hidden_act", default="silu")
    mixture = mixture_spec(
        config,
        router=RouterSpec(is_normalised=fields.flag(config, "norm_topk_prob")),
        num_experts=60,
        num_chosen=4,
    )
    shared = FeedForwardSpec(width, activation)
    mixture = replace(mixture, shared=shared, has_shared_gate=True)
    return with_mixtures(base, mixture, sparse_layers(config))


def qwen3_spec(config: Config) -> ModelSpec:
    """The spec of a Qwen3MoeForCausalLM config."""
    bias = fields.flag(config, "attention_bias")
    uses_window = fields.flag(config, "use_sliding_window")
    window = fields.window(config, default=4096) if uses_window else None
    base = llama.llama_like_spec(
        config,
        qkv_bias=bias,
        out_bias=bias,
        normalises_heads=True,
        windows=(window,) * fields.num_layers(config),
    )
    router = RouterSpec(is_normalised=fields.flag(config, "norm_topk_prob"))
    mixture = mixture_spec(config, router=router, num_experts=128, num_chosen=8)
    return with_mixtures(base, mixture, sparse_layers(config))


def olmoe_spec(config: Config) -> ModelSpec:
    """The spec of an OlmoeForCausalLM config: queries and keys are normalised whole."""
    config = {"rms_norm_eps": 1e-5, **config}
    bias = fields.flag(config, "attention_bias")
    base = llama.llama_like_spec(config, qkv_bias=bias, out_bias=bias)
    norm = base.final_norm
    assert norm is not None
    clip = fields.number(config, "clip_qkv", default=None, low=0.0)
    head_norm = HeadNormSpec(norm, "all")
    base = llama.each_attention(
        base, lambda _, own: replace(own, head_norm=head_norm, qkv_clip=clip)
    )
    mixture = mixture_spec(
        config,
        router=RouterSpec(is_normalised=fields.flag(config, "norm_topk_prob")),
        num_experts=64,
        num_chosen=8,
        width="intermediate_size",
    )
    return with_mixtures(base, mixture)


def _table(experts: ExpertsLayout) -> functools.partial:
    return functools.partial(decoder_table, layout=Layout(experts=experts))


FAMILIES = (
    Family(("MixtralForCausalLM",), mixtral_spec, _table(BLOCK_SPARSE), "Mixtral 8x7B and 8x22B"),
    Family(
        ("Qwen2MoeForCausalLM",),
        qwen2_spec,
        _table(QWEN_EXPERTS),
        "Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B",
    ),
    Family(
        ("Qwen3MoeForCausalLM",),
        qwen3_spec,
        _table(SEPARATE),
        "Qwen 3 30B-A3B and 235B-A22B, Qwen3-Coder",
    ),
    Family(("OlmoeForCausalLM",), olmoe_spec, _table(SEPARATE), "OLMoE 1B-7B"),
)
