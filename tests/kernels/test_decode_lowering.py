"""Every shipped decode configuration lowers for CUDA, which needs no GPU and no CUDA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention_xla import paged_decode_xla, ragged_attention_xla
from jaxengine.pallas_kernels.paged_decode_triton import paged_decode_triton
from jaxengine.pallas_kernels.tiles import triton_decode_config

from tests.kernels.h100 import lower_for_cuda
from tests.kernels.problems import H100

# Rows, KV heads, query heads of each -> stages and warps. Few rows on all SMs, and many.
DECODE_CONFIGS = {
    (32, 8, 4): (5, 4),
    (64, 4, 4): (5, 4),
    (64, 8, 4): (3, 4),
    (8, 1, 71): (5, 8),
    (512, 1, 128): (3, 8),
}
PLAIN = {"options": AttentionOptions(0.1), "target": H100}


def decode_shapes(
    head_dim: int, block_size: int, dtype: Any, *, B: int = 8, K: int = 2, G: int = 4
) -> list[jax.ShapeDtypeStruct]:
    num_blocks = 33
    cache = jax.ShapeDtypeStruct((num_blocks, K, block_size, head_dim), dtype)
    return [
        jax.ShapeDtypeStruct((B, K * G, head_dim), dtype),
        cache,
        cache,
        jax.ShapeDtypeStruct((B, 512), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    ]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "options", "has_alibi", "has_sinks"),
    [
        (64, 16, {"sliding_window": 128}, False, True),
        (80, 16, {"sliding_window": 128}, False, False),
        (96, 8, {"logits_soft_cap": 30.0}, False, False),
        (112, 16, {}, False, True),
        (128, 64, {}, False, False),
        (128, 16, {"sliding_window": 4096, "logits_soft_cap": 50.0}, False, False),
        (256, 32, {}, True, True),
    ],
    ids=str,
)
def test_decode_lowers_for_cuda(
    head_dim: int,
    block_size: int,
    options: dict[str, Any],
    has_alibi: bool,
    has_sinks: bool,
    dtype: Any,
) -> None:
    def run(*arrays: jax.Array) -> jax.Array:
        ones = jnp.ones(8, jnp.float32)
        return paged_decode_triton(
            *arrays,
            alibi_slopes=ones if has_alibi else None,
            sinks=ones if has_sinks else None,
            options=AttentionOptions(0.1, **options),
            target=H100,
        )

    assert "paged_decode" in lower_for_cuda(run, *decode_shapes(head_dim, block_size, dtype))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("num_rows", "num_kv_heads", "group"), DECODE_CONFIGS)
def test_every_triton_configuration_lowers_for_cuda(
    num_rows: int, num_kv_heads: int, group: int, head_dim: int
) -> None:
    config = triton_decode_config(head_dim, num_rows, num_kv_heads, group, H100.num_sms)
    assert (config.num_stages, config.num_warps) == DECODE_CONFIGS[num_rows, num_kv_heads, group]
    shapes = decode_shapes(head_dim, 16, jnp.bfloat16, B=num_rows, K=num_kv_heads, G=group)
    text = lower_for_cuda(functools.partial(paged_decode_triton, **PLAIN), *shapes)
    assert f"num_warps = {config.num_warps}" in text
    assert f"num_stages = {config.num_stages}" in text


def test_the_xla_fallback_lowers_for_cuda() -> None:
    shapes = decode_shapes(128, 16, jnp.bfloat16)
    starts, count = jax.ShapeDtypeStruct((9,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    assert "while" in lower_for_cuda(functools.partial(paged_decode_xla, **PLAIN), *shapes)
    ragged = functools.partial(ragged_attention_xla, **PLAIN)
    assert "while" in lower_for_cuda(ragged, *shapes, starts, count)
