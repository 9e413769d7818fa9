"""The fused gated product equals its reference, lowers for CUDA, and is taken where it serves."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxengine.pallas_kernels import gated_product_mosaic
from jaxengine.pallas_kernels.gated_product import ACTIVATIONS, activated_product, gated_product
from jaxengine.pallas_kernels.gated_product_mosaic import (
    GatedProductConfig,
    best_tile_columns,
    default_config,
)
from jaxengine.pallas_kernels.gated_product_reference import gated_product_reference
from jaxengine.pallas_kernels.target import Target

from tests.kernels.h100 import lower_for_cuda
from tests.kernels.problems import H100

CPU = Target("cpu")
needs_new_jax = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the gated Mosaic product needs jax 0.11"
)
# Rings shorter and longer than a row of stretches, both clusters, and tiles of several widths.
CONFIGS = {
    "alone": GatedProductConfig(num_stages=2),
    "shared": GatedProductConfig(cluster=2, num_stages=3, band=1),
    "shifted": GatedProductConfig(tile_k=32, num_stages=5, lag=2, band=2),
    "both": GatedProductConfig(tile_k=32, num_stages=4, cluster=2, lag=1, tile_columns=128),
    "narrow": GatedProductConfig(num_stages=3, tile_columns=48),
}


def arrays(
    num_rows: int, num_columns: int, num_in: int, dtype: Any = jnp.bfloat16
) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(num_rows + num_columns)
    x = jnp.asarray(rng.standard_normal((num_rows, num_in)), dtype)
    weight = jnp.asarray(rng.standard_normal((2, num_columns, num_in)) / num_in**0.5, dtype)
    return x, weight


def exact(x: jax.Array, weight: jax.Array) -> np.ndarray:
    x64, weight64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    gate, up = x64 @ weight64[0].T, x64 @ weight64[1].T
    return gate / (1 + np.exp(-gate)) * up


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    return float(
        np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
    )


def test_the_reference_is_the_formula() -> None:
    x, weight = arrays(5, 24, 40, jnp.float32)
    found = gated_product_reference(x, weight, activation="silu")
    np.testing.assert_allclose(found, exact(x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_op_serves_every_activation(activation: str) -> None:
    x, weight = arrays(3, 16, 8, jnp.float32)
    bias = jnp.linspace(-1, 1, 32).reshape(2, 16)
    gate, up = x @ weight[0].T + bias[0], x @ weight[1].T + bias[1]
    options = {"activation": activation, "target": CPU}
    found = gated_product(x, weight, bias=bias, **options)
    np.testing.assert_allclose(found, ACTIVATIONS[activation](gate) * up, rtol=1e-4, atol=1e-6)
    found = activated_product(x, weight[0], bias=bias[0], **options)
    np.testing.assert_allclose(found, ACTIVATIONS[activation](gate), rtol=1e-4, atol=1e-6)


@needs_new_jax
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_mosaic_equals_the_formula(config: str, dtype: Any) -> None:
    x, weight = arrays(512, 384, 192, dtype)
    found = gated_product_mosaic.gated_product_mosaic(
        x,
        weight,
        num_sms=4,
        config=CONFIGS[config],
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert found.dtype == dtype
    assert relative_error(found, exact(x, weight)) < 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "expected"),
    [
        (256, 14336, 112),  # 128 tiles in two rounds of 66, instead of 112 wider ones in two
        (16384, 14336, 128),
        (256, 3072, 48),  # 64 tiles in one round
        (16384, 3072, 128),
        (512, 80, 80),
    ],
)
def test_tiles_are_as_wide_as_lets_all_clusters_finish_together(
    num_rows: int, num_columns: int, expected: int
) -> None:
    assert best_tile_columns(num_rows // 256, num_columns, num_clusters=66) == expected


@pytest.mark.parametrize(
    ("num_rows", "cluster"), [(256, 1), (1024, 1), (2048, 2), (2176, 1), (16384, 2)]
)
def test_programs_share_weights_where_there_are_many_rows(num_rows: int, cluster: int) -> None:
    assert default_config(num_rows).cluster == cluster


@needs_new_jax
@pytest.mark.parametrize(
    "shape",
    [
        (256, 14336, 4096),
        (1024, 2816, 1024),
        (4096, 14336, 4096),
        (16384, 3072, 1024),
        (8192, 7168, 8192),
        (4096, 1792, 4096),
    ],
)
def test_mosaic_lowers(shape: tuple[int, int, int]) -> None:
    num_rows, num_columns, num_in = shape
    x = jax.ShapeDtypeStruct((num_rows, num_in), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((2, num_columns, num_in), jnp.bfloat16)
    text = lower_for_cuda(gated_product_mosaic.gated_product_mosaic, x, weight)
    assert "gated_product_mosaic" in text


@needs_new_jax
@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((300, 128, 64), "T is 300, not n * 128"),
        ((256, 100, 64), "F is 100, not a multiple of any of (128, "),
        ((256, 128, 80), "D is 80, not n * 64"),
    ],
)
def test_mosaic_leaves_other_shapes_to_the_reference(
    shape: tuple[int, int, int], complaint: str
) -> None:
    x, weight = arrays(*shape)
    options = {"activation": "silu", "target": H100}
    with pytest.raises(NotImplementedError, match=re.escape(complaint)):
        gated_product(x, weight, **options, implementation="mosaic")
    found = gated_product(x, weight, **options)
    expected = gated_product_reference(x, weight, activation="silu")
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@needs_new_jax
def test_a_lag_that_nobody_would_end_is_refused() -> None:
    with pytest.raises(ValueError, match="lag is 4 but there are 4 stages"):
        GatedProductConfig(lag=4)
    with pytest.raises(NotImplementedError, match="D is 128, shorter than the lag"):
        gated_product_mosaic.gated_product_mosaic(
            *arrays(128, 128, 128), config=GatedProductConfig(lag=2)
        )


@needs_new_jax
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mosaic_serves_every_activation_with_biases(activation: str) -> None:
    x, weight = arrays(128, 64, 64)
    bias = jnp.linspace(-1, 1, 128).reshape(2, 64).astype(jnp.bfloat16)
    found = gated_product_mosaic.gated_product_mosaic(
        x,
        weight,
        bias,
        activation=activation,
        num_sms=2,
        config=GatedProductConfig(num_stages=2),
        interpret=plgpu.InterpretGPUParams(),
    )
    in_float32 = (array.astype(jnp.float32) for array in (x, weight, bias))
    expected = gated_product_reference(*in_float32, activation=activation)
    assert relative_error(found, np.asarray(expected, np.float64)) < 1e-2


@needs_new_jax
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mosaic_lowers_with_every_activation_and_biases(activation: str) -> None:
    run = functools.partial(gated_product_mosaic.gated_product_mosaic, activation=activation)
    shapes = ((256, 1024), (2, 3072, 1024), (2, 3072))
    arguments = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in shapes]
    assert "gated_product_mosaic" in lower_for_cuda(run, *arguments)


def test_mosaic_refuses_float32() -> None:
    x, weight = arrays(256, 128, 64, jnp.float32)
    with pytest.raises(NotImplementedError):
        gated_product(x, weight, activation="silu", target=H100, implementation="mosaic")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"implementation": "cuda"}, "cuda"),
        ({"activation": "tanh"}, "tanh"),
        ({"weight": jnp.zeros((2, 16, 9))}, r"\(2, 16, 9\), not \(2, F, 8\)"),
        ({"weight": jnp.zeros((3, 16, 8))}, r"\(3, 16, 8\)"),
        ({"weight": jnp.zeros((2, 16, 8), jnp.bfloat16)}, "bfloat16"),
        ({"bias": jnp.zeros(16)}, r"bias is \(16,\) but weight is \(2, 16, 8\)"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], complaint: str) -> None:
    arguments = {"x": jnp.zeros((4, 8)), "weight": jnp.zeros((2, 16, 8)), "activation": "silu"}
    with pytest.raises(ValueError, match=complaint):
        gated_product(**{**arguments, **change}, target=CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(256, 128, 64), (2560, 1792, 4096), (4096, 3072, 1024)])
def test_compiled_mosaic_equals_the_reference(shape: tuple[int, int, int], dtype: Any) -> None:
    x, weight = arrays(*shape, dtype)
    found = gated_product(x, weight, activation="silu", target=H100, implementation="mosaic")
    expected = gated_product_reference(
        x.astype(jnp.float32), weight.astype(jnp.float32), activation="silu"
    )
    assert relative_error(found, np.asarray(expected, np.float64)) < 1e-2
