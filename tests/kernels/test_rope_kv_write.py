"""The fused rotation and cache write equals its reference, and lowers for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.rope_kv_write import rope_kv_write
from jaxengine.pallas_kernels.rope_kv_write_reference import rope_kv_write_reference
from jaxengine.pallas_kernels.rope_kv_write_triton import rope_kv_write_triton
from jaxengine.pallas_kernels.target import Target

from tests.kernels.h100 import lower_for_cuda

NUM_BLOCKS, BLOCK_SIZE = 9, 8
# (tokens, KV heads, group, head_dim)
SHAPES = [(5, 2, 4, 64), (1, 3, 3, 128), (7, 1, 7, 80), (4, 4, 1, 96), (3, 2, 2, 256)]
NORMS = ["none", "rms", "offset", "layer", "layer by head"]


def problem(shape, dtype=jnp.bfloat16, norm="none", rotated=None, num_parts=1, has_bias=False):
    T, K, G, H = shape
    rng = np.random.default_rng(T + H)
    normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), dtype)  # noqa: E731
    split = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)  # noqa: E731
    rotated = H if rotated is None else rotated
    angles = rng.uniform(0, 6, (T, rotated // 2)).astype(np.float32)
    slots = rng.choice(np.arange(BLOCK_SIZE, NUM_BLOCKS * BLOCK_SIZE), T, replace=False)
    parts = normal(1, T, K, G + 2, H) if num_parts == 1 else split(num_parts, T, K, G + 2, H)
    arrays = (
        Addends((parts,), normal(K, G + 2, H) if has_bias else None),
        (jnp.cos(angles), jnp.sin(angles)) if rotated else None,
        jnp.asarray(slots, jnp.int32),
        normal(NUM_BLOCKS, K, BLOCK_SIZE, H),
        normal(NUM_BLOCKS, K, BLOCK_SIZE, H),
    )

    def head_norm(num_heads):
        if norm == "none":
            return None
        dims = (num_heads, H) if norm == "layer by head" else (H,)
        if norm.startswith("layer"):
            return Norm(normal(*dims), normal(*dims), 1e-6, "layer")
        return Norm(normal(*dims), None, 1e-6, offset=1.0 if norm == "offset" else 0.0)

    return arrays, {"q_norm": head_norm(K * G), "k_norm": head_norm(K), "dtype": dtype}


def assert_same(found, expected, dtype=jnp.bfloat16, units=1):
    for ours, reference in zip(found, expected, strict=True):
        difference = jnp.abs(ours.astype(jnp.float32) - reference.astype(jnp.float32))
        scale = jnp.maximum(jnp.abs(reference.astype(jnp.float32)), 1.0)
        # One unit in the last place: a sum or a fused product may round the other way. Several
        # parts are a sum before that, whose rounding norm and rotation carry on.
        assert float((difference / scale).max()) <= units * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_the_reference(shape, norm, num_parts) -> None:
    arrays, options = problem(shape, norm=norm, num_parts=num_parts)
    found = rope_kv_write_triton(*arrays, **options, interpret=True)
    is_exact = num_parts == 1 and norm in ("none", "rms")
    assert_same(found, rope_kv_write_reference(*arrays, **options), units=1 if is_exact else 4)


@pytest.mark.parametrize("rotated", [0, 32, 48])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_triton_copies_what_is_not_rotated_and_adds_biases(rotated, has_bias, norm) -> None:
    arrays, options = problem((3, 2, 2, 80), norm=norm, rotated=rotated, has_bias=has_bias)
    found = rope_kv_write_triton(*arrays, **options, interpret=True)
    assert_same(found, rope_kv_write_reference(*arrays, **options), units=4)


@pytest.mark.gpu
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("shape", "rotated"), [*((shape, None) for shape in SHAPES), ((8, 4, 8, 80), 32)]
)
def test_compiled_triton_equals_the_reference(shape, rotated, dtype, norm, num_parts) -> None:
    arrays, options = problem(shape, dtype, norm, rotated, num_parts, has_bias=norm == "layer")
    found = rope_kv_write_triton(*arrays, **options)
    assert_same(found, rope_kv_write_reference(*arrays, **options), dtype, units=4)


def test_only_the_slots_of_the_step_change() -> None:
    arrays, options = problem((5, 2, 4, 64))
    slots, old = np.asarray(arrays[2]), np.asarray(arrays[3], np.float32)
    _, new, _ = rope_kv_write_triton(*arrays, **options, interpret=True)
    changed = (np.asarray(new, np.float32) != old).any(axis=(1, 3)).reshape(-1)
    assert sorted(np.flatnonzero(changed)) == sorted(slots)


def test_several_products_are_added_up() -> None:
    arrays, options = problem((3, 2, 2, 64), num_parts=2, has_bias=True)
    twice = (arrays[0] + arrays[0], *arrays[1:])
    found = rope_kv_write_triton(*twice, **options, interpret=True)
    assert_same(found, rope_kv_write_reference(*twice, **options), units=4)


@pytest.mark.parametrize(("norm", "rotated"), [("none", None), ("layer by head", 32)])
def test_many_queries_of_one_kv_head_are_shared_by_several_programs(norm, rotated) -> None:
    arrays, options = problem((2, 1, 71, 64), norm=norm, rotated=rotated, has_bias=True)
    found = rope_kv_write_triton(*arrays, **options, interpret=True)
    assert_same(found, rope_kv_write_reference(*arrays, **options), units=4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"q_norm": Norm(jnp.ones((3, 64)))},
            r"q_norm has \(3, 64\), neither \(64,\) nor \(4, 64\)",
        ),
        ({"k_norm": Norm(jnp.ones(32))}, r"k_norm has \(32,\)"),
    ],
)
def test_norms_of_other_heads_are_named(change, complaint) -> None:
    arrays, options = problem((3, 2, 2, 64))
    with pytest.raises(ValueError, match=complaint):
        rope_kv_write(*arrays, **{**options, **change}, target=Target("cpu"))


def test_more_angles_than_a_head_has_are_named() -> None:
    arrays, options = problem((3, 2, 2, 64), rotated=96)
    with pytest.raises(ValueError, match="96 dimensions are to be rotated of 64"):
        rope_kv_write(*arrays, **options, target=Target("cpu"))


def test_an_unknown_implementation_is_an_error() -> None:
    arrays, options = problem((1, 1, 1, 64))
    with pytest.raises(ValueError, match="cuda"):
        rope_kv_write(*arrays, **options, target=Target("cpu"), implementation="cuda")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 8, 4, 128), (16384, 8, 2, 128)])
def test_it_lowers_for_cuda(shape, norm) -> None:
    small, options = problem((1, *shape[1:]), norm=norm, has_bias=True)
    T = shape[0]

    def of_tokens(array):
        return jax.ShapeDtypeStruct((T, *array.shape[1:]), array.dtype)

    parts = small[0].arrays[0]
    addends = Addends((jax.ShapeDtypeStruct((1, T, *parts.shape[2:]), parts.dtype),), small[0].bias)
    cos_sin = tuple(map(of_tokens, small[1]))
    arrays = (addends, cos_sin, of_tokens(small[2]), *small[3:])
    norms = options["q_norm"], options["k_norm"]

    def run(arrays, norms):
        return rope_kv_write_triton(*arrays, q_norm=norms[0], k_norm=norms[1], dtype=jnp.bfloat16)

    assert "rope_kv_write" in lower_for_cuda(run, arrays, norms)
