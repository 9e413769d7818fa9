"""What each family's config means, with expected values written out."""

from typing import Any

import pytest
from jaxengine.convert.families import family_of, model_spec, supported_architectures
from jaxengine.convert.model_spec import AttentionSpec, FeedForwardSpec, ModelSpec, RopeSpec
from jaxengine.convert.overrides import override_config
from jaxengine.convert.rules import Rule

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
# What other families call the same.
OTHER_NAMES = {
    **{"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 64},
    **{"d_model": 64, "n_heads": 8, "n_layers": 2, "num_layers": 4, "num_heads": 8},
    **{"ffn_dim": 96, "ffn_hidden_size": 96, "kv_channels": 8, "padded_vocab_size": 256},
    **{"seq_length": 64, "model_type": "llama"},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 16},
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def spec_of(architecture: str = "LlamaForCausalLM", **fields: Any) -> ModelSpec:
    return model_spec({**LLAMA, "architectures": [architecture], **fields})


def attention_of(spec: ModelSpec, layer: int = 0) -> AttentionSpec:
    attention = spec.layers[layer].attention
    assert attention is not None
    return attention


def windows_of(spec: ModelSpec) -> list[int | None]:
    return [attention_of(spec, layer).sliding_window for layer in range(spec.num_layers)]


def rope_of(**fields: Any) -> RopeSpec:
    rope = attention_of(spec_of(**fields)).rope
    assert rope is not None
    return rope


def test_what_a_config_may_leave_out_has_the_values_of_hugging_face() -> None:
    spec = model_spec({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    attention, feed_forward = attention_of(spec), spec.layers[0].feed_forward
    assert (attention.num_kv_heads, attention.head_dim, attention.rope) == (8, 8, RopeSpec(8))
    assert isinstance(feed_forward, FeedForwardSpec)
    assert (feed_forward.activation, spec.final_norm and spec.final_norm.eps) == ("silu", 1e-6)
    assert not spec.head.is_tied


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 64}, [None] * 4),
        ("MistralForCausalLM", {}, [4096] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("MistralForCausalLM", {"sliding_window": 64, "max_window_layers": 3}, [64] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "max_window_layers": 0}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True}, [None] * 4),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 64],
        ),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 4096],
        ),
        ("Gemma2ForCausalLM", {"sliding_window": 64}, [64, None, 64, None]),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 64, "sliding_window_pattern": 3},
            [64, 64, None, 64],
        ),
        (
            "Gemma3TextModel",
            {"sliding_window": 64, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            [None, None, None, 64],
        ),
    ],
)  # fmt: skip
def test_each_layer_has_the_window_that_its_family_gives_it(
    architecture: str, fields: dict[str, Any], windows: list[int | None]
) -> None:
    assert windows_of(spec_of(architecture, **fields)) == windows


@pytest.mark.parametrize(
    ("architecture", "head_dim"),
    [
        ("LlamaForCausalLM", 8),
        ("Qwen2ForCausalLM", 8),
        ("Qwen3ForCausalLM", 128),
        ("Gemma2ForCausalLM", 256),
    ],
)
def test_head_dim_has_the_familys_default(architecture: str, head_dim: int) -> None:
    assert attention_of(spec_of(architecture)).head_dim == head_dim
    assert attention_of(spec_of(architecture, head_dim=None)).head_dim == head_dim
    assert attention_of(spec_of(architecture, head_dim=24)).head_dim == 24


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("LlamaForCausalLM", (True, True)),
        ("MistralForCausalLM", (False, False)),
        ("Qwen2ForCausalLM", (True, False)),
        ("Qwen3ForCausalLM", (True, True)),
    ],
)
def test_attention_bias_counts_only_where_the_family_has_it(
    architecture: str, biases: tuple[bool, bool]
) -> None:
    attention = attention_of(spec_of(architecture, attention_bias=True))
    assert (attention.qkv_bias, attention.out_bias) == biases


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn", "factor": 4}},
    ],
)
def test_rope_is_read_in_the_spelling_of_any_transformers_release(fields: dict[str, Any]) -> None:
    assert rope_of(**fields) == RopeSpec(8, 5e5, "yarn", 4096, (("factor", 4.0),))


@pytest.mark.parametrize(
    ("fields", "rotary_dim"),
    [
        ({"partial_rotary_factor": 0.5}, 4),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, 2),
        ({"rotary_pct": 0.5}, 4),
        ({}, 8),
    ],
)
def test_rope_keeps_the_rotated_share_of_a_head(fields: dict[str, Any], rotary_dim: int) -> None:
    assert rope_of(**fields).rotary_dim == rotary_dim


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"type": "dynamic", "factor": 2.0}, 8192),
        ({"type": "yarn", "factor": 4.0}, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "default"}, 4096),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            4096,
        ),
    ],
)
def test_the_default_length_counts_what_scaling_adds(scaling: dict[str, Any], length: int) -> None:
    assert spec_of(rope_scaling=scaling).max_position_embeddings == length


def test_gemma3s_windows_turn_with_their_own_base_unscaled() -> None:
    spec = spec_of(
        "Gemma3ForCausalLM", rope_theta=1e6, rope_scaling=LINEAR, sliding_window_pattern=2
    )
    assert attention_of(spec, 0).rope == RopeSpec(256, 10000.0)
    everywhere = RopeSpec(256, 1e6, "linear", parameters=(("factor", 4.0),))
    assert attention_of(spec, 1).rope == everywhere


@pytest.mark.parametrize(
    ("fields", "kv_heads", "wiring", "norms_twice"),
    [
        ({}, 1, "parallel", False),
        ({"multi_query": False}, 8, "parallel", False),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, "parallel", True),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, 8, "parallel", False),
        ({"multi_query": False, "parallel_attn": False, "alibi": True}, 8, "sequential", True),
    ],
)
def test_falcons_flags_decide_heads_and_wiring(
    fields: dict[str, Any], kv_heads: int, wiring: str, norms_twice: bool
) -> None:
    spec = spec_of("FalconForCausalLM", **fields)
    layer, attention = spec.layers[0], attention_of(spec)
    assert (attention.num_kv_heads, layer.wiring) == (kv_heads, wiring)
    assert (layer.feed_forward_norm is not None) == norms_twice
    assert (attention.rope is None) == bool(fields.get("alibi"))


def test_deci_layers_have_kv_heads_of_their_own() -> None:
    spec = spec_of("DeciLMForCausalLM", num_key_value_heads_per_layer=[4, 2, 1, 8])
    assert [attention_of(spec, layer).num_kv_heads for layer in range(4)] == [4, 2, 1, 8]


def test_deci_blocks_may_lack_a_part() -> None:
    blocks = [
        {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 6.0}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 6.0}},
        {"attention": {"n_heads_in_group": 8}, "ffn": {"no_op": True}},
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 9.0}},
    ]
    fields = {name: value for name, value in LLAMA.items() if name != "intermediate_size"}
    spec = model_spec({**fields, "architectures": ["DeciLMForCausalLM"], "block_configs": blocks})
    assert [layer.attention and layer.attention.num_kv_heads for layer in spec.layers] == [
        *(2, None, 1, 4),
    ]
    widths = [getattr(layer.feed_forward, "intermediate_size", None) for layer in spec.layers]
    assert widths == [256, 256, None, 512]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: .* between 1 and 1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": "64"}, "hidden_size='64': an integer"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_key_value_heads": 3}, "8 attention heads and 3 KV heads"),
        ({"hidden_size": 65}, "hidden_size=65, which 8 heads do not divide"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': true or false"),
        ({"hidden_act": 3}, "hidden_act=3: a string"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\]: an object"),
        ({"rope_scaling": {"type": "magic"}}, "rope_type 'magic' is not supported: use one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0"),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["x"]}, "layer_types of 1 entries"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_sense_is_named_with_its_value(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_spec({**LLAMA, **fields})


@pytest.mark.filterwarnings("ignore:.*images are refused")
@pytest.mark.parametrize("architecture", supported_architectures())
def test_a_table_fills_every_parameter_once(architecture: str) -> None:
    config = {**LLAMA, **OTHER_NAMES, "architectures": [architecture]}
    rules = family_of(config).table(model_spec(config)).rules
    assert len({rule.path for rule in rules}) == len(rules)
    for rule in rules:
        assert covered_once(rule), rule


def covered_once(rule: Rule) -> bool:
    """Whether the boxes of a rule's sources fill its parameter, by counting every element."""
    import numpy as np

    count = np.zeros(rule.shape, np.int8)
    for source in rule.sources:
        origin = (*source.origin, *(0,) * (len(rule.shape) - len(source.origin)))
        count[tuple(slice(o, o + n) for o, n in zip(origin, source.box, strict=True))] += 1
    return bool((count == 1).all())


NEW_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ({"a": 1}, None, {"a": 1}),
        ({"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        ({"a": {"b": 1, "c": 2}}, {"a.b": 5}, {"a": {"b": 5, "c": 2}}),
        ({}, {"text_config.x": 1}, {"text_config": {"x": 1}}),
        ({"a_config": {"x": 1, "y": 2}}, {"a_config": {"x": 3}}, {"a_config": {"x": 3, "y": 2}}),
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"c": 2}}),
        ({"a": 1}, lambda config: {**config, "a": 7}, {"a": 7}),
        (
            NEW_ROPE,
            {"rope_scaling": LINEAR},
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e4, **LINEAR}},
        ),
        (
            NEW_ROPE,
            {"rope_theta": 5.0},
            {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        ),
    ],
)  # fmt: skip
def test_overrides_replace_fields_before_anything_reads_them(
    config: dict[str, Any], overrides: Any, expected: dict[str, Any]
) -> None:
    before = repr(config)
    assert override_config(config, overrides) == expected
    assert repr(config) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([1], r"hf_overrides is \[1\]: use a dict"),
        (lambda config: None, "a function that returned NoneType"),
        ({"vocab_size.x": 1}, "vocab_size is 256 and not an object"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override_config(LLAMA, overrides)
