import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from jaxengine.convert import open_checkpoint, parameters
from jaxengine.convert.errors import CheckpointError
from jaxengine.convert.gguf import BIAS_GROUPS
from jaxengine.convert.gguf_file import read_gguf
from jaxengine.convert.tensors import read

from tests.convert.tiny import assert_same_tree, expected_parameters, make_model
from tests.convert.tiny_gguf import demo_model, finish, permuted, write_model

TYPES = gguf.GGMLQuantizationType
QUANTISED = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ1_S",
    "IQ1_M",
    "IQ4_NL",
    "IQ4_XS",
]


@pytest.mark.parametrize(
    ("family", "architecture"), [("Llama", "llama"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3")]
)
def test_a_gguf_file_gives_the_parameters_of_the_model_it_was_made_from(
    tmp_path: Path, family: str, architecture: str
) -> None:
    model = make_model(family)
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", model, architecture))
    assert checkpoint.format == "gguf"
    found = {p.path: p.load() for p in parameters(checkpoint)}
    assert_same_tree(found, expected_parameters(model))


def test_rows_of_q_are_put_back_also_when_a_slice_cuts_through_a_head(tmp_path: Path) -> None:
    model = make_model("Llama")
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", model, "llama"))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = model.state_dict()[name].numpy()
    assert not np.array_equal(permuted(expected, 6), expected)
    for start, stop in [(0, 96), (3, 5), (15, 17), (90, 96), (7, 7)]:
        np.testing.assert_array_equal(
            checkpoint.tensors[name].rows(start, stop), expected[start:stop]
        )


def test_tied_embeddings_and_biases_are_seen_from_the_tensors(tmp_path: Path) -> None:
    model = make_model("Llama", tie_word_embeddings=True, attention_bias=True)
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", model, "llama"))
    assert checkpoint.hf_config["tie_word_embeddings"] is True
    assert checkpoint.hf_config["attention_bias"] is True
    found = {p.path: p.load() for p in parameters(checkpoint)}
    assert_same_tree(found, expected_parameters(model))


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        (("attn_q", "attn_k", "attn_v"), (True, False, False)),
        (("attn_v",), (True, False, False)),
        (("attn_output",), (False, True, False)),
        (("ffn_up",), (False, False, True)),
    ],
)
def test_each_bias_is_taken_where_it_is_and_is_zero_where_only_others_of_its_group_are(
    tmp_path: Path, stems: tuple[str, ...], expected: tuple[bool, bool, bool]
) -> None:
    model = make_model("Llama")
    path = tmp_path / "m.gguf"
    biases = {f"blk.1.{stem}.bias": np.arange(ROWS[stem], dtype=np.float32) for stem in stems}
    # Of layer 0 none is there.
    checkpoint = open_checkpoint(write_model(path, model, "llama", biases=biases))
    names = ("attention_qkv_bias", "attention_out_bias", "mlp_bias")
    assert tuple(checkpoint.hf_config[name] for name in names) == expected
    found = {name for name in checkpoint.tensors if name.endswith(".bias")}
    group = next(group for group in BIAS_GROUPS if stems[0] in group)
    assert len(found) == 2 * len(group)
    for name in found:
        is_stored = ".1." in name and any(STEMS[stem] in name for stem in stems)
        assert read(checkpoint.tensors[name]).any() == is_stored


STEMS = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
STEMS["ffn_up"] = "up_proj"
ROWS = {"attn_q": 96, "attn_k": 32, "attn_v": 32, "attn_output": 48, "ffn_up": 40}


def test_kv_heads_that_differ_from_layer_to_layer_make_a_deci(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", make_model("Llama"), "llama", head_count_kv=[2, 1])
    config = open_checkpoint(path).hf_config
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["num_key_value_heads_per_layer"] == [2, 1]


def test_a_qwen_with_a_window_says_which_layers_have_it(tmp_path: Path) -> None:
    keys = {"sliding_window": 32, "sliding_window_pattern": [True, False]}
    path = write_model(tmp_path / "m.gguf", make_model("Qwen3"), "qwen3", **keys)
    config = open_checkpoint(path).hf_config
    assert config["use_sliding_window"] is True
    assert config["sliding_window"] == 32
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": 10**9}, "llama.block_count is 1000000000, possible .* between 1 and 21"),
        ({"key_length": 10**9}, "llama.attention.key_length is 1000000000, possible .* and 4096"),
        ({"embedding_length": 2**31}, "llama.embedding_length is 2147483648"),
        ({"head_count": 0}, "llama.attention.head_count is 0, possible is an integer between 1"),
        ({"head_count_kv": [2]}, "llama.attention.head_count_kv has 1 entries, there are 2 layers"),
        ({"value_length": 4}, "llama.attention.value_length is 4, keys have 16"),
        ({"layer_norm_rms_eps": float("inf")}, "rms_epsilon is inf, possible is a number"),
        ({"key_length": 7}, "is not made of heads of 7 rows"),
    ],
)
def test_a_number_that_makes_no_sense_is_named_with_its_limit(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = write_model(tmp_path / "m.gguf", make_model("Llama"), "llama", **keys)
    with pytest.raises(CheckpointError, match=rf"m\.gguf.*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("alignment", "message"),
    [(48, "it must be a power of two"), (0, "between 1"), (1 << 30, "between 1 and 1048576")],
)
def test_an_alignment_that_is_no_small_power_of_two_is_refused(
    tmp_path: Path, alignment: int, message: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("general.alignment", alignment)
    with pytest.raises(CheckpointError, match=rf"general\.alignment is {alignment}, .*{message}"):
        read_gguf(finish(writer, tmp_path / "m.gguf"))


def test_offsets_that_leave_a_gap_or_overlap_are_refused(tmp_path: Path) -> None:
    path = write_tensor(tmp_path / "m.gguf", np.zeros((2, 64), np.float32), TYPES.F32)
    whole = path.read_bytes()
    for offset in (0, 64):
        path.write_bytes(whole.replace(struct.pack("<IQ", 0, 32), struct.pack("<IQ", 0, offset)))
        with pytest.raises(CheckpointError, match=f"'x' has offset {offset}, expected 32 behind"):
            read_gguf(path)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    writer.add_tensor("xxxxxx", np.ones(3, np.float32))
    writer.add_tensor("xxxxxy", np.ones(3, np.float32))
    path = finish(writer, tmp_path / "n.gguf")
    path.write_bytes(path.read_bytes().replace(b"xxxxxy", b"xxxxxx"))
    with pytest.raises(CheckpointError, match="tensor 'xxxxxx' is there twice"):
        read_gguf(path)


def test_the_config_has_the_sizes_of_the_metadata(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", make_model("Qwen3"), "qwen3")
    config = open_checkpoint(path).hf_config
    expected = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 56,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rms_norm_eps"] == pytest.approx(1e-6)


def test_a_llama_file_with_a_sliding_window_is_a_mistral(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", make_model("Mistral"), "llama", sliding_window=32)
    config = open_checkpoint(path).hf_config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 32


def test_yarn_scaling_is_read_from_the_metadata(tmp_path: Path) -> None:
    scaling: dict[str, Any] = {
        "rope_scaling_type": gguf.RopeScalingType.YARN,
        "rope_scaling_factor": 4.0,
        "rope_scaling_orig_ctx_len": 16,
    }
    path = write_model(tmp_path / "m.gguf", make_model("Qwen2"), "qwen2", **scaling)
    assert open_checkpoint(path).hf_config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


def rope_freqs_file(path: Path, factors: np.ndarray) -> Path:
    """A file with only the metadata of a Llama 3.1, and the frequency factors."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 131072, "embedding_length": 128}
    sizes |= {"feed_forward_length": 8, "head_count": 1, "key_length": 128}
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    return finish(writer, path)


def test_llama3_scaling_is_recovered_from_its_frequency_factors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = {"rope_theta": 500000.0, **scaling}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    path = rope_freqs_file(tmp_path / "m.gguf", plain / scaled.numpy())
    assert open_checkpoint(path).hf_config["rope_scaling"] == scaling


def write_tensor(path: Path, blocks: np.ndarray, kind: TYPES) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("x", blocks, raw_dtype=kind)
    return finish(writer, path)


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_of_every_quantised_type_equal_those_of_the_whole(tmp_path: Path, name: str) -> None:
    kind = TYPES[name]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 50, (4, 2 * block_bytes), np.uint8)
    tensor = read_gguf(write_tensor(tmp_path / "m.gguf", blocks, kind)).tensors["x"]
    assert tensor.shape == (4, 2 * per_block)
    expected = dequantize(blocks, kind)
    np.testing.assert_array_equal(read(tensor), expected)
    np.testing.assert_array_equal(tensor.rows(1, 3), expected[1:3])
    assert tensor.rows(2, 2).shape == (0, 2 * per_block)


def test_q8_0_values_are_those_that_were_quantised_up_to_its_step(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    blocks = quantize(values, TYPES.Q8_0)
    tensor = read_gguf(write_tensor(tmp_path / "m.gguf", blocks, TYPES.Q8_0)).tensors["x"]
    np.testing.assert_allclose(read(tensor), values, atol=0.02)


def test_a_type_that_cannot_be_dequantised_is_named_when_opening(tmp_path: Path) -> None:
    path = write_tensor(tmp_path / "m.gguf", np.zeros((2, 292), np.uint8), TYPES.Q8_K)
    with pytest.raises(ValueError, match="'x' is of type Q8_K"):
        read_gguf(path)


def test_bfloat16_tensors_stay_bfloat16(tmp_path: Path) -> None:
    blocks = quantize(np.ones((2, 4), np.float32), TYPES.BF16)
    tensor = read_gguf(write_tensor(tmp_path / "m.gguf", blocks, TYPES.BF16)).tensors["x"]
    assert tensor.dtype.name == "bfloat16"
    np.testing.assert_array_equal(read(tensor).astype(np.float32), np.ones((2, 4)))


def test_every_cut_of_the_header_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", make_model("Llama", num_hidden_layers=1), "llama")
    whole = path.read_bytes()
    header_bytes = whole.index(b"blk.0.ffn_down.weight")
    for size in range(0, header_bytes, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            open_checkpoint(path)


def test_a_file_cut_in_its_data_names_a_tensor_that_is_lost(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", make_model("Llama"), "llama")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"truncated: tensor 'output.weight' of shape \(56, 48\)"):
        open_checkpoint(path)


def test_a_header_that_claims_a_huge_array_is_refused_without_reading_it(tmp_path: Path) -> None:
    key = b"general.x"
    huge = struct.pack("<IIQ", 9, 8, 2**60)  # an array of strings
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + huge
    (tmp_path / "m.gguf").write_bytes(header)
    with pytest.raises(ValueError, match=r"length of the metadata key 'general.x' is 11529215"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="is no GGUF file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    path = finish(gguf.GGUFWriter(tmp_path / "m.gguf", "whisper"), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"'whisper', .* supported: llama, qwen2, qwen3"):
        open_checkpoint(path)


def test_a_missing_metadata_key_is_named(tmp_path: Path) -> None:
    path = finish(gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"lacks the metadata key llama\.block_count"):
        open_checkpoint(path)


def split(path: Path, model: Any, num_parts: int) -> list[Path]:
    """A model in several files, as llama.cpp's gguf-split cuts one."""
    whole = write_model(path / "whole.gguf", model, "llama")
    reader = gguf.GGUFReader(whole)
    per_part = -(-len(reader.tensors) // num_parts)
    paths = []
    for number in range(num_parts):
        part = path / f"m-{number + 1:05}-of-{num_parts:05}.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("llama."):
                    writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", num_parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number * per_part : (number + 1) * per_part]:
            writer.add_tensor(tensor.name, tensor.data)
        paths.append(finish(writer, part))
    whole.unlink()
    return paths


def test_any_part_of_a_split_file_opens_the_whole(tmp_path: Path) -> None:
    model = make_model("Llama")
    paths = split(tmp_path, model, 3)
    for source in (*paths, tmp_path):
        checkpoint = open_checkpoint(source)
        assert checkpoint.source == paths[0]
        found = {p.path: p.load() for p in parameters(checkpoint)}
        assert_same_tree(found, expected_parameters(model))


def test_a_missing_part_of_a_split_file_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path, make_model("Llama"), 3)
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is missing: .* one of 3 parts"):
        open_checkpoint(paths[2])


def test_parts_of_a_split_file_that_are_mixed_up_or_renamed_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path, make_model("Llama"), 2)
    second = paths[1].read_bytes()
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match=r"says that it is part 1 of 2, its name that it is 2"):
        open_checkpoint(paths[0])
    (tmp_path / "renamed.gguf").write_bytes(second)
    with pytest.raises(ValueError, match=r"one of 2 parts, .* expected NAME-00001-of-00002\.gguf"):
        open_checkpoint(tmp_path / "renamed.gguf")


def test_two_models_in_one_directory_are_not_taken_for_parts(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_model(tmp_path / name, make_model("Llama", num_hidden_layers=1), "llama")
    with pytest.raises(ValueError, match=r"one \*\.gguf, found a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_a_directory_with_one_gguf_file_is_opened_as_that_file(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", make_model("Llama"), "llama")
    assert open_checkpoint(tmp_path).source == tmp_path / "m.gguf"


def test_the_demo_model_has_all_its_parameters() -> None:
    checkpoint = open_checkpoint(demo_model())
    shapes = {p.path: p.shape for p in parameters(checkpoint, "bfloat16")}
    assert len(shapes) == 2 + 6 * 30
    assert shapes["layers.29.attention.qkv_proj.weight"] == (3, 5, 64, 576)
    assert checkpoint.hf_config["rope_theta"] == 100000.0
