"""Every quantised format against a slow packer written from its published layout."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jaxengine.convert import open_checkpoint, parameters
from jaxengine.convert.quantised import plain_tensors
from jaxengine.convert.quantised.packing import FP4_VALUES, unpack

from tests.convert.tiny import expected_parameters, save_model

NUM_IN, NUM_OUT, GROUP = 64, 24, 16
FP8 = ml_dtypes.float8_e4m3fn
BLOCKS = {"weight_block_size": [16, 32]}
RNG = np.random.default_rng(0)
Tensors = dict[str, np.ndarray]


class Stored:
    """A tensor in memory, with what a file's would have."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, values.nbytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop] if self.values.ndim else self.values


def plain(tensors: Tensors, **declared: Any) -> dict[str, Any]:
    stored = {name: Stored(name, values) for name, values in tensors.items()}
    return dict(plain_tensors(stored, {"quantization_config": declared, "dtype": "float32"}))


def assert_dequantises(tensor: Any, expected: np.ndarray) -> None:
    assert tensor.shape == expected.shape
    found = tensor.rows(0, expected.shape[0])
    np.testing.assert_array_equal(found, expected.astype(tensor.dtype))
    np.testing.assert_array_equal(tensor.rows(5, 11), expected[5:11].astype(tensor.dtype))


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of the first axis as a stream of bits, the lowest first, in words; a loop a column."""
    words = np.zeros((values.shape[0] * bits // 32, values.shape[1]), np.int64)
    for column in range(values.shape[1]):
        whole = sum(int(v) << (bits * i) for i, v in enumerate(values[:, column]))
        for word in range(words.shape[0]):
            words[word, column] = (whole >> (32 * word)) & 0xFFFFFFFF
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_are_unpacked_along_either_axis(bits: int) -> None:
    values = RNG.integers(0, 1 << bits, (96, 5))
    np.testing.assert_array_equal(unpack(stream(values, bits), bits, axis=0), values)
    np.testing.assert_array_equal(unpack(stream(values, bits).T, bits, axis=1), values.T)


def random_groups(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers [in, out], zero points and float16 scales [in / g, out]."""
    q = RNG.integers(0, 1 << bits, (NUM_IN, NUM_OUT))
    zeros = RNG.integers(1, 1 << bits, (NUM_IN // GROUP, NUM_OUT))
    scales = RNG.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    return q, zeros, scales


def awq_words(values: np.ndarray) -> np.ndarray:
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, column::8].astype(np.int64) << (4 * nibble)
    return words.astype(np.uint32).view(np.int32)


def awq_tensors(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, base: str) -> Tensors:
    return {
        f"{base}.qweight": awq_words(q),
        f"{base}.qzeros": awq_words(zeros),
        f"{base}.scales": scales,
    }


def test_awq() -> None:
    q, zeros, scales = random_groups(4)
    tensors = plain(awq_tensors(q, zeros, scales, "m"), quant_method="awq", bits=4, version="gemm")
    group = np.arange(NUM_IN) // GROUP
    expected = ((q - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)).T
    assert list(tensors) == ["m.weight"]
    assert_dequantises(tensors["m.weight"], expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("order", ["in groups", "desc_act", "no g_idx"])
def test_gptq(bits: int, is_v2: bool, order: str) -> None:
    q, zeros, scales = random_groups(bits)
    zeros = np.resize(zeros, (NUM_IN // GROUP, 32))[:, :NUM_OUT] if bits != 3 else zeros
    group = np.arange(NUM_IN) // GROUP
    if order == "desc_act":
        group = RNG.permutation(group)
    num_columns = 32  # 3 bits are packed 32 at a time
    q, zeros, scales = (np.resize(a, (a.shape[0], num_columns)) for a in (q, zeros, scales))
    tensors = {
        "m.qweight": stream(q, bits),
        "m.qzeros": stream((zeros - (not is_v2)).T, bits).T,
        "m.scales": scales,
        "m.g_idx": group.astype(np.int32),
        "m.bias": np.zeros(num_columns, np.float16),
    }
    if order == "no g_idx":
        del tensors["m.g_idx"]
    declared = {"quant_method": "gptq", "bits": bits}
    found = plain(tensors, **declared, checkpoint_format="gptq_v2" if is_v2 else "gptq")
    expected = ((q - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)).T
    assert sorted(found) == ["m.bias", "m.weight"]
    assert_dequantises(found["m.weight"], expected)


def test_squeezellm_with_outliers() -> None:
    q = RNG.integers(0, 16, (NUM_IN, NUM_OUT))
    table = RNG.standard_normal((NUM_OUT, 16)).astype(np.float16)
    outliers = np.where(RNG.random((NUM_OUT, NUM_IN)) < 0.05, 1.5, 0.0).astype(np.float32)
    rows = np.concatenate([[0], np.cumsum((outliers != 0).sum(1))]).astype(np.int32)
    found = plain(
        {
            "m.qweight": stream(q, 4),
            "m.lookup_table": table,
            "m.rows": rows,
            "m.cols": np.nonzero(outliers)[1].astype(np.int32),
            "m.vals": outliers[outliers != 0],
        },
        quant_method="squeezellm",
        wbits=4,
    )
    expected = np.array(
        [[float(table[o, q[i, o]]) for i in range(NUM_IN)] for o in range(NUM_OUT)], np.float32
    )
    assert_dequantises(found["m.weight"], expected + outliers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_packed_integers_of_compressed_tensors(bits: int, is_symmetric: bool) -> None:
    q = RNG.integers(0, 1 << bits, (NUM_OUT, NUM_IN))
    scales = RNG.uniform(0.01, 0.1, (NUM_OUT, NUM_IN // GROUP)).astype(ml_dtypes.bfloat16)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    tensors = {
        "m.weight_packed": stream(q.T, bits).T.copy(),
        "m.weight_scale": scales,
        "m.weight_shape": np.array([NUM_OUT, NUM_IN]),
    }
    if not is_symmetric:
        zeros = RNG.integers(0, 1 << bits, scales.shape)
        tensors["m.weight_zero_point"] = stream(
            np.resize(zeros, (NUM_OUT + 8, zeros.shape[1])), bits
        )
    found = plain(tensors, quant_method="compressed-tensors", config_groups={})
    each = np.repeat(np.arange(scales.shape[1]), GROUP)
    expected = (q - zeros[:, each]).astype(np.float32) * scales.astype(np.float32)[:, each]
    assert_dequantises(found["m.weight"], expected)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_packed_fp4_of_compressed_tensors(kind: str) -> None:
    codes = RNG.integers(0, 16, (NUM_OUT, NUM_IN)).astype(np.uint8)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    if kind == "mxfp4":
        exponents = RNG.integers(120, 130, (NUM_OUT, NUM_IN // 32)).astype(np.uint8)
        tensors = {"m.weight_packed": packed, "m.weight_scale": exponents}
        scales = np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, axis=1)
    else:
        stored = RNG.uniform(1, 100, (NUM_OUT, NUM_IN // 16)).astype(FP8)
        whole = np.array([8.0], np.float32)
        tensors = {
            "m.weight_packed": packed,
            "m.weight_scale": stored,
            "m.weight_global_scale": whole,
            "m.input_global_scale": whole,
        }
        scales = np.repeat(stored.astype(np.float32) / 8, 16, axis=1)
    found = plain(tensors, quant_method="compressed-tensors", config_groups={})
    assert list(found) == ["m.weight"]
    assert_dequantises(found["m.weight"], FP4_VALUES[codes] * scales)


@pytest.mark.parametrize(
    ("declared", "suffix", "shape", "dtype"),
    [
        ({"quant_method": "fp8"}, "weight_scale", (), FP8),
        ({**BLOCKS, "quant_method": "fp8"}, "weight_scale_inv", (2, 2), FP8),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", (NUM_OUT, 1), FP8),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", (1,), FP8),
        ({"quant_method": "compressed-tensors"}, "weight_scale", (NUM_OUT, 1), np.int8),
        ({"quant_method": "compressed-tensors"}, "weight_scale", (NUM_OUT,), FP8),
    ],
)  # fmt: skip
def test_eight_bits_with_scales(
    declared: dict[str, Any], suffix: str, shape: tuple[int, ...], dtype: Any
) -> None:
    weight = RNG.integers(-100, 100, (NUM_OUT, NUM_IN)).astype(dtype)
    scale = RNG.uniform(0.01, 0.1, shape).astype(np.float32)
    tensors = {"m.weight": weight, f"m.{suffix}": scale, "m.input_scale": scale, "m.k_scale": scale}
    found = plain({**tensors, "norm.weight": np.ones(4, np.float32)}, **declared)
    assert sorted(found) == ["m.weight", "norm.weight"]
    if shape == (2, 2):
        rows, columns = np.arange(NUM_OUT) // 16, np.arange(NUM_IN) // 32
        scale = scale[rows][:, columns]
    elif scale.size == NUM_OUT:
        scale = scale.reshape(-1, 1)
    assert_dequantises(found["m.weight"], weight.astype(np.float32) * scale)


def test_bitsandbytes_int8() -> None:
    weight = RNG.integers(-127, 128, (NUM_OUT, NUM_IN)).astype(np.int8)
    largest = RNG.uniform(0.5, 2, NUM_OUT).astype(np.float32)
    found = plain(
        {"m.weight": weight, "m.SCB": largest}, load_in_8bit=True, quant_method="bitsandbytes"
    )
    expected = weight.astype(np.float32) * (largest.reshape(-1, 1) / np.float32(127))
    assert_dequantises(found["m.weight"], expected)


@pytest.mark.parametrize("is_nested", [False, True])
def test_bitsandbytes_nf4(is_nested: bool) -> None:
    codes = RNG.integers(0, 16, NUM_OUT * NUM_IN).astype(np.uint8)
    table = np.sort(RNG.standard_normal(16)).astype(np.float32)
    num_blocks = codes.size // 64
    state: dict[str, Any] = {"shape": [NUM_OUT, NUM_IN], "blocksize": 64, "quant_type": "nf4"}
    tensors = {
        "m.weight": ((codes[::2] << 4) | codes[1::2]).reshape(-1, 1),
        "m.weight.quant_map": table,
    }
    if is_nested:
        inner = RNG.integers(0, 256, num_blocks).astype(np.uint8)
        inner_table = RNG.standard_normal(256).astype(np.float32)
        outer = RNG.uniform(0.5, 1, 2).astype(np.float32)
        state |= {"nested_blocksize": 16, "nested_offset": 0.25}
        tensors |= {
            "m.weight.absmax": inner,
            "m.weight.nested_absmax": outer,
            "m.weight.nested_quant_map": inner_table,
        }
        absmax = inner_table[inner] * outer[np.arange(num_blocks) // 16] + np.float32(0.25)
    else:
        absmax = RNG.uniform(0.1, 1, num_blocks).astype(np.float32)
        tensors["m.weight.absmax"] = absmax
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = text
    found = plain(tensors, quant_method="bitsandbytes", load_in_4bit=True)
    assert list(found) == ["m.weight"]
    expected = table[codes] * np.repeat(absmax, 64)
    assert_dequantises(found["m.weight"], expected.reshape(NUM_OUT, NUM_IN))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "magic"}, "quant_method 'magic', which is not supported: .* awq, gptq"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5: gptq is read with 2, 3, 4, 8 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv': only 'gemm' is read"),
    ],
)
def test_a_format_that_is_not_read_is_refused_by_name(
    declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plain({"m.qweight": np.zeros((8, 8), np.int32)}, **declared)


def test_a_plane_that_is_missing_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"m\.weight: the quantised weight has qweight, .* 'qzeros'"
    ):
        plain({"m.qweight": np.zeros((8, 8), np.int32)}, quant_method="awq")


def test_a_whole_awq_checkpoint_fills_the_parameters_of_its_dequantised_model(
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file, save_file

    model = save_model(tmp_path, "Llama", hidden_size=48, intermediate_size=40)
    tensors, dense = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if "_proj.weight" in n]:
        num_out, num_in = tensors[name].shape
        q = RNG.integers(0, 16, (num_in, num_out))
        zeros = RNG.integers(0, 16, (num_in // 8, num_out))
        scales = RNG.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
        del tensors[name]
        tensors |= awq_tensors(q, zeros, scales, name.removesuffix(".weight"))
        group = np.arange(num_in) // 8
        dense[name] = ((q - zeros[group]) * scales[group].astype(np.float32)).T
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, values in dense.items():
        rounded = values.astype(np.float16).astype(np.float32)
        model.get_parameter(name).data.copy_(__import__("torch").tensor(rounded))
    found = {p.path: p.load() for p in parameters(open_checkpoint(tmp_path), "float32")}
    expected = expected_parameters(model)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, err_msg=path)
