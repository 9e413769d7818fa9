"""What XLA is told about a step follows from its size and from the GPU."""

import types
from typing import Any

import jax
import numpy as np
import pytest

from jaxengine.engine.device.compiler_options import compiler_options
from jaxengine.engine.device.step import StageParts

TRITON = "xla_gpu_enable_triton_gemm"
TILES = "xla_gpu_override_gemm_autotuner"


def test_a_cpu_is_told_nothing() -> None:
    assert compiler_options("cpu", 8) == {}


@pytest.mark.parametrize(
    ("num_tokens", "is_hopper", "has_triton", "block_m"),
    [
        (8, True, True, None),
        (9, True, True, 16),
        (16, True, True, 16),
        (32, True, True, 32),
        (33, True, False, None),
        (16384, True, False, None),
        (8, False, True, None),
        (32, False, True, None),
        (64, False, False, None),
    ],
)
def test_triton_products_are_for_few_rows_and_tried_out_for_the_fewest(
    num_tokens: int,
    is_hopper: bool,
    has_triton: bool,
    block_m: int | None,
) -> None:
    options = compiler_options("gpu", num_tokens, is_hopper=is_hopper)
    assert options.get(TRITON, True) == has_triton
    assert (TILES in options) == (block_m is not None)
    if block_m is not None:
        assert str(options[TILES]).startswith(f"block_m: {block_m} block_n: ")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [8, 16, 32, 64])
def test_a_product_compiled_so_is_right(num_tokens: int) -> None:
    keys = jax.random.split(jax.random.key(num_tokens))
    x = jax.random.normal(keys[0], (num_tokens, 1024))
    weight = jax.random.normal(keys[1], (512, 1024)) / 32

    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x @ weight.T

    lowered = jax.jit(multiply).lower(x.astype("bfloat16"), weight.astype("bfloat16"))
    program = lowered.compile(compiler_options("gpu", num_tokens, is_hopper=True))
    found = program(x.astype("bfloat16"), weight.astype("bfloat16")).astype("float32")
    with jax.default_matmul_precision("highest"):
        expected = multiply(x, weight)
    assert float(jax.numpy.linalg.norm(found - expected) / jax.numpy.linalg.norm(expected)) < 1e-2


@pytest.mark.parametrize(
    ("device_kind", "expected"),
    [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)],
)
def test_hopper_is_known_by_its_name(device_kind: str, expected: bool) -> None:
    device = types.SimpleNamespace(platform="gpu", device_kind=device_kind)
    mesh: Any = types.SimpleNamespace(devices=np.array([device], object))
    assert StageParts(None, {}, mesh, range(1)).is_on_hopper == expected
