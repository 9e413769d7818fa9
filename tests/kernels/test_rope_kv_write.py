"""The fused rotation and cache write equals its reference, and lowers for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.rope_kv_write import HeadNorm, rope_kv_write
from jaxengine.pallas_kernels.rope_kv_write_reference import rope_kv_write_reference
from jaxengine.pallas_kernels.rope_kv_write_triton import rope_kv_write_triton

from tests.kernels.h100 import lower_for_cuda

NUM_BLOCKS, BLOCK_SIZE = 9, 8
# (tokens, KV heads, group, head_dim)
SHAPES = [(5, 2, 4, 64), (1, 3, 3, 128), (7, 1, 7, 80), (4, 4, 1, 96), (3, 2, 2, 256)]


def problem(shape, dtype=jnp.bfloat16, has_norm=False, rotated=None, num_parts=1):
    T, K, G, H = shape
    rng = np.random.default_rng(T + H)
    normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), dtype)  # noqa: E731
    split = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)  # noqa: E731
    angles = rng.uniform(0, 6, (T, (rotated or H) // 2)).astype(np.float32)
    slots = rng.choice(np.arange(BLOCK_SIZE, NUM_BLOCKS * BLOCK_SIZE), T, replace=False)
    arrays = (
        normal(1, T, K, G + 2, H) if num_parts == 1 else split(num_parts, T, K, G + 2, H),
        jnp.cos(angles),
        jnp.sin(angles),
        jnp.asarray(slots, jnp.int32),
        normal(NUM_BLOCKS, K, BLOCK_SIZE, H),
        normal(NUM_BLOCKS, K, BLOCK_SIZE, H),
    )
    norm = HeadNorm(normal(H), normal(H), 1e-6) if has_norm else None
    return arrays, norm


def assert_same(found, expected, dtype=jnp.bfloat16, units=1):
    for ours, reference in zip(found, expected, strict=True):
        difference = jnp.abs(ours.astype(jnp.float32) - reference.astype(jnp.float32))
        scale = jnp.maximum(jnp.abs(reference.astype(jnp.float32)), 1.0)
        # One unit in the last place: a sum or a fused product may round the other way. Several
        # parts are a sum before that, whose rounding norm and rotation carry on.
        assert float((difference / scale).max()) <= units * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_the_reference(shape, has_norm, num_parts) -> None:
    arrays, norm = problem(shape, has_norm=has_norm, num_parts=num_parts)
    options = {"norm": norm, "dtype": jnp.bfloat16}
    found = rope_kv_write_triton(*arrays, **options, interpret=True)
    assert_same(
        found, rope_kv_write_reference(*arrays, **options), units=1 if num_parts == 1 else 4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_triton_equals_the_reference(shape, dtype, has_norm, num_parts) -> None:
    arrays, norm = problem(shape, dtype, has_norm, num_parts=num_parts)
    options = {"norm": norm, "dtype": dtype}
    found = rope_kv_write(*arrays, **options, implementation="triton")
    units = 1 if num_parts == 1 else 4
    assert_same(found, rope_kv_write_reference(*arrays, **options), dtype, units)


def test_only_the_slots_of_the_step_change() -> None:
    arrays, _ = problem((5, 2, 4, 64))
    slots, old = np.asarray(arrays[3]), np.asarray(arrays[4], np.float32)
    _, new, _ = rope_kv_write_triton(*arrays, dtype=jnp.bfloat16, interpret=True)
    changed = (np.asarray(new, np.float32) != old).any(axis=(1, 3)).reshape(-1)
    assert sorted(np.flatnonzero(changed)) == sorted(slots)


def test_a_partial_rotation_is_left_to_the_reference() -> None:
    arrays, _ = problem((3, 2, 2, 64), rotated=32)
    with pytest.raises(NotImplementedError, match="32 of 64"):
        rope_kv_write(*arrays, dtype=jnp.bfloat16, implementation="triton")
    queries, _, _ = rope_kv_write(*arrays, dtype=jnp.bfloat16)
    untouched = arrays[0][0, :, :, :-2, 32:].reshape(3, 4, 32)
    assert (queries[..., 32:] == untouched).all()


def test_an_unknown_implementation_is_an_error() -> None:
    arrays, _ = problem((1, 1, 1, 64))
    with pytest.raises(ValueError, match="cuda"):
        rope_kv_write(*arrays, dtype=jnp.bfloat16, implementation="cuda")


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 8, 4, 128), (16384, 8, 2, 128)])
def test_it_lowers_for_cuda(shape, has_norm) -> None:
    T, K, G, H = shape
    cache = jax.ShapeDtypeStruct((NUM_BLOCKS, K, BLOCK_SIZE, H), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((T, H // 2), jnp.float32)
    arrays = (
        jax.ShapeDtypeStruct((1, T, K, G + 2, H), jnp.bfloat16),
        angle,
        angle,
        jax.ShapeDtypeStruct((T,), jnp.int32),
        cache,
        cache,
    )
    weight = jax.ShapeDtypeStruct((H,), jnp.bfloat16)

    def run(arrays, weights):
        norm = HeadNorm(*weights, 1e-6) if has_norm else None
        return rope_kv_write_triton(*arrays, norm=norm, dtype=jnp.bfloat16)

    assert "rope_kv_write" in lower_for_cuda(run, arrays, (weight, weight))
