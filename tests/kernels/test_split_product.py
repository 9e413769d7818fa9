"""Products of few rows equal their references, alone and as what reads their parts sees them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.few_rows_triton import (
    FewRowsConfig,
    gated_few_rows_triton,
    split_product_triton,
)
from jaxengine.pallas_kernels.gated_product import gated_product
from jaxengine.pallas_kernels.split_product import split_product
from jaxengine.pallas_kernels.split_product_reference import split_product_reference

from tests.kernels.h100 import lower_for_cuda

TINY = FewRowsConfig(tile_out=16, tile_in=32, num_splits=2, num_stages=2)
# (rows, out, in)
SHAPES = [(1, 32, 128), (8, 48, 64), (17, 16, 192), (32, 64, 128)]
ON_GPU = [
    (1, 4096, 4096), (8, 6144, 4096), (9, 4096, 14336), (32, 4096, 7168), (16, 960, 576),
    (3, 16, 64),
]  # fmt: skip


def rows_and_weight(
    shape: tuple[int, int, int], dtype: str, lead: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    num_rows, num_out, num_in = shape
    rng = np.random.default_rng(sum(shape))
    x = jnp.asarray(rng.standard_normal((num_rows, num_in)), dtype)
    weight = jnp.asarray(rng.standard_normal((*lead, num_out, num_in)) / num_in**0.5, dtype)
    return x, weight


def assert_parts_sum_to_the_product(parts: jax.Array, x: jax.Array, weight: jax.Array) -> None:
    exact = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    np.testing.assert_allclose(np.asarray(parts, np.float32).sum(axis=0), exact, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_sum_to_the_product(shape: tuple[int, int, int], dtype: str) -> None:
    x, weight = rows_and_weight(shape, dtype)
    parts = split_product_triton(x, weight, config=TINY, interpret=True)
    assert parts.shape == (2, *shape[:2])
    assert parts.dtype == jnp.float32
    assert_parts_sum_to_the_product(parts, x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
def test_parts_sum_to_the_product_on_a_gpu(shape: tuple[int, int, int], dtype: str) -> None:
    x, weight = rows_and_weight(shape, dtype)
    assert_parts_sum_to_the_product(split_product_triton(x, weight), x, weight)


def assert_gated(found: jax.Array, x: jax.Array, weight: jax.Array, activation: str) -> None:
    x32, weight32 = x.astype(jnp.float32), weight.astype(jnp.float32)
    exact = gated_product(x32, weight32, activation=activation, implementation="reference")
    tolerance = 4 * float(jnp.finfo(found.dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_product_equals_its_reference(
    shape: tuple[int, int, int], activation: str
) -> None:
    x, weight = rows_and_weight(shape, "bfloat16", (2,))
    config = FewRowsConfig(tile_out=16, tile_in=64, num_stages=2)
    found = gated_few_rows_triton(x, weight, activation=activation, config=config, interpret=True)
    assert_gated(found, x, weight, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize(
    "shape", [(1, 14336, 4096), (8, 7168, 4096), (32, 3072, 1024), (17, 1536, 576)], ids=str
)
def test_the_gated_product_equals_its_reference_on_a_gpu(
    shape: tuple[int, int, int], activation: str
) -> None:
    x, weight = rows_and_weight(shape, "bfloat16", (2,))
    assert_gated(gated_few_rows_triton(x, weight, activation=activation), x, weight, activation)


def test_the_op_gives_one_part_where_no_kernel_runs() -> None:
    x, weight = rows_and_weight((3, 40, 24), "float32")
    np.testing.assert_array_equal(split_product(x, weight), split_product_reference(x, weight))
    assert split_product(x, weight).shape == (1, 3, 40)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((8, 64, 128), "float32", "not of 16 bits"),
        ((33, 64, 128), "bfloat16", "33 rows, more than 32"),
        ((8, 40, 128), "bfloat16", r"no tiles divide \[40, 128\]"),
        ((8, 64, 100), "bfloat16", r"no tiles divide \[64, 100\]"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(
    shape: tuple[int, int, int], dtype: str, reason: str
) -> None:
    x, weight = rows_and_weight(shape, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        split_product(x, weight, implementation="triton")
    with pytest.raises(NotImplementedError, match=reason):
        gated_product(x, jnp.stack([weight] * 2), activation="silu", implementation="triton")


def test_the_error_function_is_left_to_xla() -> None:
    x, weight = rows_and_weight((8, 64, 128), "bfloat16", (2,))
    with pytest.raises(NotImplementedError, match="activation gelu"):
        gated_product(x, weight, activation="gelu", implementation="triton")


def test_the_activation_needs_whole_sums() -> None:
    x, weight = rows_and_weight((8, 64, 128), "bfloat16", (2,))
    with pytest.raises(ValueError, match="num_splits is 2"):
        gated_few_rows_triton(x, weight, activation="silu", config=FewRowsConfig(num_splits=2))


def test_wrong_arguments_are_named() -> None:
    x, weight = rows_and_weight((8, 64, 128), "bfloat16")
    with pytest.raises(ValueError, match="'mosaic' is not one of reference, triton"):
        split_product(x, weight, implementation="mosaic")
    with pytest.raises(ValueError, match=r"bfloat16\[8, 128\] but weight is bfloat16\[64, 127\]"):
        split_product(x, weight[:, 1:])
    with pytest.raises(ValueError, match=r"weight is float32"):
        split_product(x, weight.astype(jnp.float32))


@pytest.mark.parametrize("shape", [(8, 6144, 4096), (32, 4096, 1792), (16, 960, 576)], ids=str)
def test_products_lower_for_cuda(shape: tuple[int, int, int]) -> None:
    num_rows, num_out, num_in = shape

    def run(x: jax.Array, weight: jax.Array, gate_up: jax.Array) -> Any:
        return split_product_triton(x, weight), gated_few_rows_triton(x, gate_up, activation="silu")

    arguments = [
        jax.ShapeDtypeStruct(dims, jnp.bfloat16)
        for dims in ((num_rows, num_in), (num_out, num_in), (2, num_out, num_in))
    ]
    text = lower_for_cuda(run, *arguments)
    assert "split_product" in text
    assert "gated_few_rows" in text
