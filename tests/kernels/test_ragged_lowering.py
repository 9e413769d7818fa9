"""Every shipped configuration of the ragged kernels lowers for an H100, without one at hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.ragged_attention_mosaic import ragged_attention_mosaic
from jaxengine.pallas_kernels.ragged_attention_triton import ragged_attention_triton

from tests.kernels.h100 import lower_for_cuda
from tests.kernels.problems import H100

OPTIONS = {
    "plain": {},
    "window and sinks": {"sliding_window": 100, "sinks": True},
    "everything": {
        "sliding_window": 100,
        "logits_soft_cap": 30.0,
        "alibi": True,
        "sinks": True,
    },
}


def lower(
    attention: Callable[..., jax.Array],
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    block_size: int = 16,
    dtype: Any = jnp.bfloat16,
    num_tokens: int = 256,
    alibi: bool = False,
    sinks: bool = False,
    **options: Any,
) -> str:
    """Return the program lowered for CUDA, as text."""

    def call(*arrays: jax.Array) -> jax.Array:
        ones = jnp.ones((num_heads,))
        return attention(
            *arrays,
            alibi_slopes=ones if alibi else None,
            sinks=ones if sinks else None,
            options=AttentionOptions(0.1, **options),
            target=H100,
        )

    cache = jax.ShapeDtypeStruct((9, num_kv_heads, block_size, head_dim), dtype)
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 8), (4,), (5,), ())]
    q = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype)
    return lower_for_cuda(call, q, cache, cache, *integers)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("options", OPTIONS)
def test_triton_lowers(head_dim: int, options: str) -> None:
    text = lower(ragged_attention_triton, head_dim=head_dim, **OPTIONS[options])
    assert "ragged_attention_triton" in text


@pytest.mark.parametrize("num_heads", [2, 6, 14, 16, 256])
def test_triton_lowers_for_group(num_heads: int) -> None:
    lower(ragged_attention_triton, num_heads=num_heads)


@pytest.mark.parametrize("block_size", [8, 32, 64])
def test_triton_lowers_for_block_size(block_size: int) -> None:
    lower(ragged_attention_triton, block_size=block_size)


def test_triton_lowers_for_float16() -> None:
    lower(ragged_attention_triton, dtype=jnp.float16)


needs_new_jax = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="ragged Mosaic attention needs jax 0.11"
)


@needs_new_jax
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS)
def test_mosaic_lowers(head_dim: int, options: str) -> None:
    text = lower(ragged_attention_mosaic, head_dim=head_dim, **OPTIONS[options])
    assert "ragged_attention_mosaic" in text


@needs_new_jax
@pytest.mark.parametrize("num_heads", [2, 6, 14])
def test_mosaic_lowers_for_group(num_heads: int) -> None:
    lower(ragged_attention_mosaic, num_heads=num_heads)


@needs_new_jax
@pytest.mark.parametrize("block_size", [8, 32, 64, 256])
def test_mosaic_lowers_for_block_size(block_size: int) -> None:
    lower(ragged_attention_mosaic, block_size=block_size)


@needs_new_jax
def test_mosaic_lowers_for_float16() -> None:
    lower(ragged_attention_mosaic, dtype=jnp.float16)


@needs_new_jax
def test_mosaic_lowers_for_a_number_of_tokens_that_is_no_multiple_of_8() -> None:
    lower(ragged_attention_mosaic, num_tokens=13)
