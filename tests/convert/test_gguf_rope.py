"""Every key of a GGUF file about the rotary embedding, as the config.json that it amounts to."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import Keys, RopeScalingType
from jaxengine.convert.gguf_file import read_gguf
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.gguf_rope import rope_config

from tests.convert.tiny_gguf import finish

Rope = Keys.Rope
HEAD_DIM, CONTEXT_LENGTH = 8, 256
PLAIN = {"rope_theta": 10000.0, "rope_scaling": None}


def rope(tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any] | None = None) -> Any:
    """The config of a file with these keys and tensors; a float is written as one of 32 bits."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT_LENGTH)
    for key, value in keys.items():
        name = key.replace("{arch}", "llama")
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
        add[type(value)](name, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    file = read_gguf(finish(writer, path))
    return rope_config(file, Metadata(path, file.metadata, "llama"), HEAD_DIM)


def scaling(tmp_path: Path, *args: Any) -> Any:
    return rope(tmp_path, *args)["rope_scaling"]


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({Rope.SCALING_TYPE: "linear", Rope.SCALING_FACTOR: 4.0}, LINEAR),
        ({Rope.SCALING_FACTOR: 4.0}, LINEAR),
        ({"{arch}.rope.scale_linear": 4.0}, LINEAR),
        ({"{arch}.rope.scale_linear": 2.0, Rope.SCALING_FACTOR: 4.0}, LINEAR),
        ({Rope.SCALING_TYPE: "linear", "{arch}.rope.scale_linear": 4.0}, LINEAR),
        ({Rope.SCALING_TYPE: "none", Rope.SCALING_FACTOR: 4.0}, None),
        ({Rope.SCALING_TYPE: "yarn"}, None),
        ({Rope.SCALING_FACTOR: 0.0}, None),
        ({Rope.SCALING_FACTOR: 1.0}, None),
    ],
)
def test_a_factor_is_linear_under_its_new_and_old_key_and_without_a_type(
    tmp_path: Path, keys: dict[str, Any], expected: Any
) -> None:
    assert scaling(tmp_path, keys) == expected


YARN = {Rope.SCALING_TYPE: RopeScalingType.YARN.value, Rope.SCALING_FACTOR: 4.0}
YARN_OF_4 = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": CONTEXT_LENGTH,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LOG_SCALE = 0.1 * np.log(4.0) + 1.0  # what yarn multiplies cosine and sine by, of itself


@pytest.mark.parametrize(
    ("keys", "differences"),
    [
        ({}, {}),
        ({Rope.SCALING_ORIG_CTX_LEN: 64}, {"original_max_position_embeddings": 64}),
        ({Rope.SCALING_YARN_BETA_FAST: 16.0}, {"beta_fast": 16.0}),
        ({Rope.SCALING_YARN_BETA_SLOW: 2.0}, {"beta_slow": 2.0}),
        ({Rope.SCALING_YARN_EXT_FACTOR: 1.0}, {}),
        ({Rope.SCALING_ATTN_FACTOR: 0.5}, {"attention_factor": 0.5 * LOG_SCALE}),
        ({Rope.SCALING_YARN_ATTN_FACTOR: 0.5}, {"attention_factor": 0.5 * LOG_SCALE}),
        (
            {Rope.SCALING_YARN_LOG_MUL: 0.5},
            {"attention_factor": LOG_SCALE / (0.05 * np.log(4.0) + 1.0)},
        ),
    ],
)
def test_yarn_has_every_parameter_of_its_keys(
    tmp_path: Path, keys: dict[str, Any], differences: dict[str, Any]
) -> None:
    found = scaling(tmp_path, {**YARN, **keys})
    assert found == pytest.approx({**YARN_OF_4, **differences})


def test_yarn_that_mixes_nothing_is_linear_and_half_a_mix_is_refused(tmp_path: Path) -> None:
    assert scaling(tmp_path, {**YARN, Rope.SCALING_YARN_EXT_FACTOR: 0.0}) == LINEAR
    with pytest.raises(ValueError, match=r"llama\.rope\.scaling\.yarn_ext_factor is 0\.5"):
        scaling(tmp_path, {**YARN, Rope.SCALING_YARN_EXT_FACTOR: 0.5})


def test_an_attention_factor_counts_for_any_type(tmp_path: Path) -> None:
    found = scaling(tmp_path, {Rope.SCALING_FACTOR: 2.0, Rope.SCALING_ATTN_FACTOR: 0.5})
    assert found == {
        "rope_type": "longrope",
        "short_factor": [2.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": CONTEXT_LENGTH,
        "attention_factor": 0.5,
    }


def test_longrope_has_both_lists_of_factors(tmp_path: Path) -> None:
    short, long = [1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 4.0, 8.0]
    keys = {Rope.SCALING_TYPE: "longrope", Rope.SCALING_ORIG_CTX_LEN: 64}
    keys |= {Rope.SCALING_ATTN_FACTOR: 1.25}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    assert scaling(tmp_path, keys, tensors) == {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    }


def test_frequency_factors_that_are_no_llama3_divide_each_frequency(tmp_path: Path) -> None:
    found = scaling(tmp_path, {Rope.SCALING_FACTOR: 2.0}, {"rope_freqs.weight": [1, 2, 3, 4]})
    assert found["rope_type"] == "longrope"
    assert found["short_factor"] == found["long_factor"] == [2.0, 4.0, 6.0, 8.0]
    assert found["attention_factor"] == 1.0
    assert scaling(tmp_path, {}, {"rope_freqs.weight": [1, 1, 1, 1]}) is None


def test_base_and_rotated_share_are_read(tmp_path: Path) -> None:
    assert rope(tmp_path, {}) == PLAIN
    keys = {Rope.FREQ_BASE: 500.0, Rope.DIMENSION_COUNT: 4}
    expected = {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.5}
    assert rope(tmp_path, keys) == expected
    assert rope(tmp_path, {Rope.FREQ_BASE: 0.0}) == PLAIN
    assert rope(tmp_path, {Rope.SCALING_ALPHA: 8.0})["rope_theta"] == 10000.0 * 8 ** (8 / 6)


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({Rope.SCALING_TYPE: "spiral"}, {}, "type is 'spiral', known: none, linear, yarn"),
        ({Rope.SCALING_TYPE: 3}, {}, "type is 3, no text"),
        ({Rope.SCALING_FACTOR: float("nan")}, {}, "factor is nan, possible is a number"),
        ({Rope.FREQ_BASE: -1.0}, {}, r"freq_base is -1\.0"),
        ({Rope.DIMENSION_COUNT: 10**9}, {}, "dimension_count is 1000000000, possible .* and 8"),
        ({Rope.DIMENSION_COUNT: 8.0}, {}, r"dimension_count is 8\.0, possible is an integer"),
        ({}, {"rope_freqs.weight": [1.0, 2.0]}, r"has shape \(2,\), expected \(4,\)"),
        ({}, {"rope_freqs.weight": [1.0, 0.0, 1.0, 1.0]}, "a factor that is no positive number"),
        ({}, {"rope_factors_long.weight": [1.0] * 4}, "rope_factors_short.weight and"),
        (YARN, {"rope_freqs.weight": [1.0] * 4}, "both yarn and rope_freqs"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(
    tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rope(tmp_path, keys, tensors)


def test_every_rope_key_of_the_format_is_one_that_is_read_or_of_other_models() -> None:
    # Windows' own rotary embedding and sections are of architectures that are not read.
    of_others = {"DIMENSION_COUNT_SWA", "DIMENSION_SECTIONS", "FREQ_BASE_SWA"}
    of_others.add("SCALING_FINETUNED")  # says nothing about the computation
    read = {
        *("DIMENSION_COUNT", "FREQ_BASE", "SCALING_TYPE", "SCALING_FACTOR", "SCALING_ALPHA"),
        *("SCALING_ATTN_FACTOR", "SCALING_ORIG_CTX_LEN", "SCALING_YARN_LOG_MUL"),
        *("SCALING_YARN_EXT_FACTOR", "SCALING_YARN_ATTN_FACTOR", "SCALING_YARN_BETA_FAST"),
        "SCALING_YARN_BETA_SLOW",
    }
    assert {name for name in vars(Rope) if name.isupper()} == read | of_others
