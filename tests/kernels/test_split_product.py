"""Products of few rows equal their references, alone and as what reads their parts sees them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.few_rows_triton import (
    FewRowsConfig,
    activated_few_rows_triton,
    gated_few_rows_triton,
    split_product_triton,
)
from jaxengine.pallas_kernels.gated_product import (
    ACTIVATIONS,
    activated_product,
    gated_product,
)
from jaxengine.pallas_kernels.split_product import split_product
from jaxengine.pallas_kernels.split_product_reference import split_product_reference
from jaxengine.pallas_kernels.target import Target

from tests.kernels.h100 import lower_for_cuda
from tests.kernels.problems import H100

CPU = Target("cpu")

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


def assert_activated(
    found: jax.Array, x: jax.Array, weight: jax.Array, bias: jax.Array | None, activation: str
) -> None:
    x32, weight32 = x.astype(jnp.float32), weight.astype(jnp.float32)
    bias = None if bias is None else bias.astype(jnp.float32)
    product = gated_product if weight.ndim == 3 else activated_product
    exact = product(x32, weight32, bias=bias, activation=activation, target=CPU)
    tolerance = 4 * float(jnp.finfo(found.dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=tolerance, atol=tolerance)


SMALL = FewRowsConfig(tile_out=16, tile_in=64, num_stages=2)


def biases(weight: jax.Array) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal(weight.shape[:-1]), weight.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_product_equals_its_reference(shape: tuple[int, int, int]) -> None:
    x, weight = rows_and_weight(shape, "bfloat16", (2,))
    found = gated_few_rows_triton(x, weight, activation="silu", config=SMALL, interpret=True)
    assert_activated(found, x, weight, None, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_activation_equals_its_reference_with_biases_and_without_a_gate(
    dtype: str, activation: str
) -> None:
    x, weight = rows_and_weight((5, 32, 128), dtype, (2,))
    options = {"activation": activation, "config": SMALL, "interpret": True}
    bias = biases(weight)
    found = gated_few_rows_triton(x, weight, bias, **options)
    assert_activated(found, x, weight, bias, activation)
    found = activated_few_rows_triton(x, weight[0], bias[0], **options)
    assert_activated(found, x, weight[0], bias[0], activation)
    found = activated_few_rows_triton(x, weight[0], **options)
    assert_activated(found, x, weight[0], None, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 14336, 4096), (8, 7168, 4096), (32, 3072, 1024), (17, 1536, 576)], ids=str
)
def test_products_and_activations_equal_their_references_on_a_gpu(
    shape: tuple[int, int, int], activation: str
) -> None:
    x, weight = rows_and_weight(shape, "bfloat16", (2,))
    bias = biases(weight)
    found = gated_few_rows_triton(x, weight, activation=activation)
    assert_activated(found, x, weight, None, activation)
    found = gated_few_rows_triton(x, weight, bias, activation=activation)
    assert_activated(found, x, weight, bias, activation)
    found = activated_few_rows_triton(x, weight[1], bias[1], activation=activation)
    assert_activated(found, x, weight[1], bias[1], activation)


def test_the_op_gives_one_part_where_no_kernel_runs() -> None:
    x, weight = rows_and_weight((3, 40, 24), "float32")
    found = split_product(x, weight, target=CPU)
    np.testing.assert_array_equal(found, split_product_reference(x, weight))
    assert found.shape == (1, 3, 40)


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
        split_product(x, weight, target=H100, implementation="triton")
    how = {"activation": "silu", "target": H100, "implementation": "triton"}
    with pytest.raises(NotImplementedError, match=reason):
        gated_product(x, jnp.stack([weight] * 2), **how)
    with pytest.raises(NotImplementedError, match=reason):
        activated_product(x, weight, **how)


def test_the_activation_needs_whole_sums() -> None:
    x, weight = rows_and_weight((8, 64, 128), "bfloat16", (2,))
    with pytest.raises(ValueError, match="num_splits is 2"):
        gated_few_rows_triton(x, weight, activation="silu", config=FewRowsConfig(num_splits=2))


def test_wrong_arguments_are_named() -> None:
    x, weight = rows_and_weight((8, 64, 128), "bfloat16")
    with pytest.raises(ValueError, match="'mosaic' is not one of reference, triton"):
        split_product(x, weight, target=CPU, implementation="mosaic")
    with pytest.raises(ValueError, match=r"bfloat16\[8, 128\] but weight is bfloat16\[64, 127\]"):
        split_product(x, weight[:, 1:], target=CPU)
    with pytest.raises(ValueError, match=r"weight is float32"):
        split_product(x, weight.astype(jnp.float32), target=CPU)


@pytest.mark.parametrize("shape", [(8, 6144, 4096), (32, 4096, 1792), (16, 960, 576)], ids=str)
def test_products_lower_for_cuda(shape: tuple[int, int, int]) -> None:
    num_rows, num_out, num_in = shape

    def run(x: jax.Array, weight: jax.Array, gate_up: jax.Array, bias: jax.Array) -> Any:
        return (
            split_product_triton(x, weight),
            gated_few_rows_triton(x, gate_up, activation="silu"),
            gated_few_rows_triton(x, gate_up, bias, activation="gelu"),
            activated_few_rows_triton(x, weight, bias[0], activation="quick_gelu"),
        )

    shapes = ((num_rows, num_in), (num_out, num_in), (2, num_out, num_in), (2, num_out))
    arguments = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in shapes]
    text = lower_for_cuda(run, *arguments)
    for name in ("split_product", "gated_few_rows", "activated_few_rows"):
        assert name in text
