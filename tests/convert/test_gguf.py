import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from jaxengine.convert import open_checkpoint, parameters
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


def test_a_directory_with_one_gguf_file_is_opened_as_that_file(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", make_model("Llama"), "llama")
    assert open_checkpoint(tmp_path).source == tmp_path / "m.gguf"


def test_the_demo_model_has_all_its_parameters() -> None:
    checkpoint = open_checkpoint(demo_model())
    shapes = {p.path: p.shape for p in parameters(checkpoint, "bfloat16")}
    assert len(shapes) == 2 + 6 * 30
    assert shapes["layers.29.attention.qkv_proj.weight"] == (3, 5, 64, 576)
    assert checkpoint.hf_config["rope_theta"] == 100000.0
