"""The residual stream's sum and norm equal their reference, and every size finds who serves it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxengine.pallas_kernels.residual_norm import residual_norm, residual_sum
from jaxengine.pallas_kernels.residual_norm_reference import (
    residual_norm_reference,
    rms_norm,
    sum_parts,
)
from jaxengine.pallas_kernels.residual_norm_triton import residual_norm_triton

AXIS = "tp"
EPS = 1e-5
# (parts, rows, columns)
SHAPES = [(1, 3, 64), (2, 8, 576), (4, 1, 128), (3, 5, 1000)]


def problem(
    shape: tuple[int, int, int], dtype: str = "bfloat16", parts_dtype: str = "float32"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(sum(shape))
    normal = rng.standard_normal
    return (
        jnp.asarray(normal(shape), parts_dtype),
        jnp.asarray(normal(shape[1:]), dtype),
        jnp.asarray(normal(shape[2:]), dtype),
    )


def on_one_device(function: Any, *arrays: jax.Array) -> Any:
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(sharded)(*arrays)


def reference(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return on_one_device(
        lambda *arrays: residual_norm_reference(*arrays, eps=EPS, axis_name=AXIS), *arrays
    )


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        # The parts may be added up in another order, which moves a sum by a unit in the last place.
        tolerance = 4 * float(jnp.finfo(ours.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=tolerance,
            atol=tolerance,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape: tuple[int, int, int], dtype: str) -> None:
    arrays = problem(shape, dtype)
    found = residual_norm_triton(*arrays, eps=EPS, interpret=True)
    assert_same(found, reference(*arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 4096), (2, 8, 5120), (1, 2, 16384)], ids=str)
def test_compiled_triton_equals_the_reference(shape: tuple[int, int, int], dtype: str) -> None:
    arrays = problem(shape, dtype)
    assert_same(residual_norm_triton(*arrays, eps=EPS), reference(*arrays))


def test_the_reference_is_what_its_words_say() -> None:
    parts, residual, weight = problem((2, 3, 64), "float32")
    total, normed = reference(parts, residual, weight)
    exact = np.asarray(parts).sum(axis=0) + residual
    np.testing.assert_allclose(total, exact, rtol=1e-6, atol=1e-6)
    scale = np.sqrt(np.square(exact).mean(axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed, exact / scale * weight, rtol=1e-5, atol=1e-6)


def test_one_part_is_rounded_and_several_are_added_up_before_that() -> None:
    parts = jnp.asarray([[1.0], [2**-8], [2**-8]])  # the small ones vanish if added one by one
    assert sum_parts(parts[:1], jnp.bfloat16).tolist() == [1.0]
    assert sum_parts(parts, jnp.bfloat16).tolist() == [1 + 2**-7]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_is_the_reference_where_no_kernel_runs(shape: tuple[int, int, int]) -> None:
    arrays = problem(shape)

    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return residual_norm(
            *arrays, eps=EPS, peers=None, axis_name=AXIS, implementation="reference"
        )

    assert_same(on_one_device(run, *arrays), reference(*arrays))

    def without_norm(parts: jax.Array, residual: jax.Array) -> jax.Array:
        return residual_sum(parts, residual, peers=None, axis_name=AXIS)

    total = on_one_device(without_norm, *arrays[:2])
    np.testing.assert_array_equal(total, reference(*arrays)[0])
    assert rms_norm(total, arrays[2], EPS).shape == total.shape


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((1, 2, 64), "float32", "not of 16 bits"), ((1, 1, 16392), "bfloat16", "16392 columns")],
)
def test_what_the_kernel_does_not_serve_is_refused(
    shape: tuple[int, int, int], dtype: str, reason: str
) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        residual_norm_triton(*problem(shape, dtype), eps=EPS)


def test_an_unknown_implementation_is_an_error() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of reference, triton"):
        residual_norm(
            *problem((1, 2, 64)), eps=EPS, peers=None, axis_name=AXIS, implementation="cuda"
        )
