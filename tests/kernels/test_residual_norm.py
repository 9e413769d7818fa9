"""The residual stream's sum and norm equal their reference, and every size finds who serves it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxengine.pallas_kernels.norms import normalise, sum_addends
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.residual_norm import residual_norm, residual_sum
from jaxengine.pallas_kernels.residual_norm_reference import residual_norm_reference
from jaxengine.pallas_kernels.residual_norm_triton import residual_norm_triton
from jaxengine.pallas_kernels.target import Target

AXIS = "tp"
EPS = 1e-5
PLAIN = Target("cpu", implementation="reference")
# (parts, rows, columns)
SHAPES = [(1, 3, 64), (2, 8, 576), (4, 1, 128), (3, 5, 1000)]


def problem(
    shape: tuple[int, int, int], dtype: str = "bfloat16", parts_dtype: str = "float32"
) -> tuple[Addends, jax.Array, tuple[Norm, ...]]:
    rng = np.random.default_rng(sum(shape))
    normal = rng.standard_normal
    return (
        Addends((jnp.asarray(normal(shape), parts_dtype),)),
        jnp.asarray(normal(shape[1:]), dtype),
        (Norm(jnp.asarray(normal(shape[2:]), dtype), None, EPS),),
    )


KINDS = {
    "layer": Norm(jnp.ones(()), jnp.ones(()), EPS, "layer"),
    "layer without bias": Norm(jnp.ones(()), None, EPS, "layer"),
    "offset": Norm(jnp.ones(()), None, EPS, offset=1.0),
    "plain": Norm(jnp.ones(()), None, EPS),
    "no weight": Norm(None, None, EPS, "layer"),
}
# Norms of the stream, the inner norm, whether there is a bias, how many products, the scale.
OPTIONS: dict[str, tuple[tuple[str, ...], str | None, bool, int, float]] = {
    "GPT-2": (("layer",), None, True, 1, 1.0),
    "Phi": (("layer",), None, True, 2, 1.0),
    "Falcon 40B": (("layer", "layer without bias"), None, False, 2, 1.0),
    "Gemma 2": (("offset",), "offset", False, 1, 1.0),
    "Granite": (("plain",), None, False, 1, 0.22),
    "OLMo": (("no weight",), None, False, 1, 1.0),
}


def general_problem(name: str, shape: tuple[int, int, int], dtype: str) -> tuple[tuple, dict]:
    """Operands of an op, and its options."""
    norms, inner, has_bias, num_products, scale = OPTIONS[name]
    rng = np.random.default_rng(len(name))

    def normal(*dims: int, kind: str = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(dims), kind)

    def norm(kind: str) -> Norm:
        return jax.tree.map(lambda _: normal(shape[2]), KINDS[kind])

    products = tuple(normal(*shape, kind="float32") for _ in range(num_products))
    addends = Addends(products, normal(shape[2]) if has_bias else None)
    options = {"inner": None if inner is None else norm(inner), "scale": scale}
    return (addends, normal(*shape[1:]), tuple(map(norm, norms))), options


def on_one_device(function: Any, *arrays: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(sharded)(*arrays)


def reference(*operands: Any, **options: Any) -> Any:
    def run(operands: Any, inner: Norm | None) -> Any:
        how = {**options, "inner": inner}
        return residual_norm_reference(*operands, **how, axis_name=AXIS)

    return on_one_device(run, operands, options.get("inner"))


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
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
    found = residual_norm_triton(*arrays, interpret=True)
    assert_same(found, reference(*arrays))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 96), (1, 2, 64)], ids=str)
def test_triton_equals_the_reference_with_every_option(
    name: str, shape: tuple[int, int, int]
) -> None:
    operands, options = general_problem(name, shape, "bfloat16")
    found = residual_norm_triton(*operands, **options, interpret=True)
    assert_same(found, reference(*operands, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 96), (1, 32, 4096), (2, 8, 2560)], ids=str)
def test_compiled_triton_equals_the_reference_with_every_option(
    name: str, shape: tuple[int, int, int]
) -> None:
    operands, options = general_problem(name, shape, "bfloat16")
    assert_same(residual_norm_triton(*operands, **options), reference(*operands, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 4096), (2, 8, 5120), (1, 2, 16384)], ids=str)
def test_compiled_triton_equals_the_reference(shape: tuple[int, int, int], dtype: str) -> None:
    arrays = problem(shape, dtype)
    assert_same(residual_norm_triton(*arrays), reference(*arrays))


def test_the_reference_is_what_its_words_say() -> None:
    addends, residual, (norm,) = problem((2, 3, 64), "float32")
    total, (normed,) = reference(addends, residual, (norm,))
    exact = np.asarray(addends.arrays[0]).sum(axis=0) + residual
    np.testing.assert_allclose(total, exact, rtol=1e-6, atol=1e-6)
    scale = np.sqrt(np.square(exact).mean(axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed, exact / scale * norm.weight, rtol=1e-5, atol=1e-6)


def test_one_part_is_rounded_and_several_are_added_up_before_that() -> None:
    parts = jnp.asarray([[1.0], [2**-8], [2**-8]])  # the small ones vanish if added one by one
    assert sum_addends(Addends((parts[:1],)), jnp.bfloat16).tolist() == [1.0]
    assert sum_addends(Addends((parts,)), jnp.bfloat16).tolist() == [1 + 2**-7]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_is_the_reference_where_no_kernel_runs(shape: tuple[int, int, int]) -> None:
    arrays = problem(shape)

    def run(*arrays: Any) -> Any:
        return residual_norm(*arrays, peers=None, axis_name=AXIS, target=PLAIN)

    assert_same(on_one_device(run, *arrays), reference(*arrays))

    def without_norm(addends: Addends, residual: jax.Array) -> jax.Array:
        return residual_sum(addends, residual, peers=None, axis_name=AXIS, target=PLAIN)

    total = on_one_device(without_norm, *arrays[:2])
    np.testing.assert_array_equal(total, reference(*arrays)[0])
    assert normalise(total, arrays[2][0]).shape == total.shape


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((1, 2, 64), "float32", "not of 16 bits"), ((1, 1, 16392), "bfloat16", "16392 columns")],
)
def test_what_the_kernel_does_not_serve_is_refused(
    shape: tuple[int, int, int], dtype: str, reason: str
) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        residual_norm_triton(*problem(shape, dtype))


def test_an_unknown_implementation_is_an_error() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of reference, triton"):
        residual_norm(
            *problem((1, 2, 64)),
            peers=None,
            axis_name=AXIS,
            target=Target("cpu"),
            implementation="cuda",
        )
