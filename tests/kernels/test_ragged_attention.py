"""Ragged prefill attention kernels against the plain jnp reference, on small ragged batches."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention_reference import paged_attention_reference
from jaxengine.pallas_kernels.ragged_attention_mosaic import (
    RaggedMosaicConfig,
    ragged_attention_mosaic,
)
from jaxengine.pallas_kernels.ragged_attention_triton import (
    RaggedTritonConfig,
    ragged_attention_triton,
)

from tests.kernels.problems import H100

SMALL = RaggedTritonConfig(rows=16, tile_kv=16, num_warps=4, num_stages=2)
SMALL_MOSAIC = RaggedMosaicConfig(tile_kv=64, num_stages=2, take_turns=True, num_programs=2)
needs_mosaic_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax < 0.11 has no Mosaic GPU interpreter"
)


@dataclass
class Batch:
    """Rows of (query length, KV length), packed, with shuffled blocks and padding at the end."""

    rows: list[tuple[int, int]]
    num_decode_rows: int = 0
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    block_size: int = 8
    padding_tokens: int = 0
    padding_rows: int = 0
    dtype: Any = jnp.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    def arrays(self) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(0)
        query_lens = [query for query, _ in self.rows] + [0] * self.padding_rows
        seq_lens = [length for _, length in self.rows] + [0] * self.padding_rows
        num_blocks = [-(-length // self.block_size) for length in seq_lens]
        ids = 1 + rng.permutation(sum(num_blocks))
        tables = np.zeros((len(seq_lens), max(num_blocks)), np.int32)
        for row, count in enumerate(num_blocks):
            tables[row, :count], ids = ids[:count], ids[count:]
        cache_shape = (sum(num_blocks) + 1, self.num_kv_heads, self.block_size, self.head_dim)
        q_shape = (sum(query_lens) + self.padding_tokens, self.num_heads, self.head_dim)
        q, k, v = (
            jnp.asarray(rng.standard_normal(shape), self.dtype)
            for shape in (q_shape, cache_shape, cache_shape)
        )
        return (
            q,
            k,
            v,
            jnp.asarray(tables),
            jnp.asarray(seq_lens, jnp.int32),
            jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32),
            jnp.asarray(self.num_decode_rows, jnp.int32),
        )

    def all_options(self) -> dict[str, Any]:
        options = dict(self.options)
        per_head = {name: options.pop(name, None) for name in ("alibi_slopes", "sinks")}
        return {**per_head, "options": AttentionOptions(self.head_dim**-0.5, **options)}

    def expected(self) -> np.ndarray:
        """The reference, with zeros for the tokens that the ragged kernels leave alone."""
        reference = paged_attention_reference(*self.arrays()[:-1], **self.all_options())
        return np.asarray(reference, np.float32).copy()


def check(batch: Batch, out: jax.Array) -> None:
    expected = batch.expected()
    expected[: batch.num_decode_rows] = 0  # one token each, left to the decode kernel
    assert out.dtype == batch.dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-2, rtol=2e-2)


BATCHES = {
    "chunks_on_top_of_different_prefixes": Batch([(5, 40), (17, 18), (33, 70), (20, 20)]),
    "rows_of_one_query_that_are_not_decode_rows": Batch([(1, 1), (1, 30), (9, 9)]),
    "decode_rows_first": Batch([(1, 12), (1, 50), (1, 3), (21, 29)], num_decode_rows=3),
    "padding_rows_and_tokens": Batch([(11, 19), (6, 6)], padding_tokens=15, padding_rows=3),
    "multi_head_and_float16": Batch([(19, 35)], num_heads=3, num_kv_heads=3, dtype=jnp.float16),
    "group_of_three": Batch([(19, 35), (4, 9)], num_heads=6, num_kv_heads=2),
    "group_of_four": Batch([(19, 35), (4, 9)], num_heads=8, num_kv_heads=2),
    "sliding_window": Batch([(40, 75), (9, 9)], options={"sliding_window": 11}),
    "sliding_window_of_one_key": Batch([(20, 30)], options={"sliding_window": 1}),
    "soft_cap": Batch([(19, 35)], options={"logits_soft_cap": 2.0}),
    "alibi": Batch([(19, 35)], options={"alibi_slopes": jnp.array([0.5, 0.125])}),
    "sinks": Batch([(1, 1), (19, 35)], options={"sinks": jnp.array([2.0, -1.0])}, padding_tokens=3),
    "everything_together": Batch(
        [(3, 60), (26, 31)],
        options={
            "sliding_window": 20,
            "logits_soft_cap": 5.0,
            "alibi_slopes": jnp.array([0.5, 0.125]),
            "sinks": jnp.array([2.0, -1.0]),
        },
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_triton_equals_the_reference(name: str) -> None:
    batch = BATCHES[name]
    out = ragged_attention_triton(
        *batch.arrays(), **batch.all_options(), target=H100, config=SMALL, interpret=True
    )
    check(batch, out)


@pytest.mark.parametrize("head_dim", [80, 112, 256])
def test_triton_serves_head_dim(head_dim: int) -> None:
    batch = Batch([(7, 20), (3, 3)], head_dim=head_dim)
    out = ragged_attention_triton(
        *batch.arrays(), **batch.all_options(), target=H100, config=SMALL, interpret=True
    )
    check(batch, out)


def test_triton_serves_many_query_heads_of_one_kv_head() -> None:
    batch = Batch([(3, 20), (2, 2)], num_heads=71)
    config = SMALL._replace(rows=128)
    out = ragged_attention_triton(
        *batch.arrays(), **batch.all_options(), target=H100, config=config, interpret=True
    )
    check(batch, out)


def test_triton_refuses_float32() -> None:
    batch = Batch([(3, 3)], dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        ragged_attention_triton(*batch.arrays(), **batch.all_options(), target=H100, interpret=True)


def test_triton_refuses_a_head_dim_over_256() -> None:
    batch = Batch([(3, 3)], head_dim=512)
    with pytest.raises(NotImplementedError, match="512"):
        ragged_attention_triton(*batch.arrays(), **batch.all_options(), target=H100, interpret=True)


MOSAIC_BATCHES = {
    **{
        name: BATCHES[name]
        for name in (
            "decode_rows_first",
            "padding_rows_and_tokens",
            "multi_head_and_float16",
            "group_of_four",
            "sinks",
            "everything_together",
        )
    },
    "more_tiles_than_stages": Batch([(70, 290), (130, 130)], head_dim=128, block_size=16),
    "blocks_larger_than_a_tile_and_head_dim_256": Batch([(9, 200)], head_dim=256, block_size=128),
}


@needs_mosaic_interpreter
@pytest.mark.parametrize("name", MOSAIC_BATCHES)
def test_mosaic_equals_the_reference_without_races(name: str) -> None:
    batch = MOSAIC_BATCHES[name]
    out = ragged_attention_mosaic(
        *batch.arrays(),
        **batch.all_options(),
        target=H100,
        config=SMALL_MOSAIC,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    check(batch, out)


@needs_mosaic_interpreter
def test_mosaic_refuses_a_head_dim_that_is_no_multiple_of_64() -> None:
    batch = Batch([(3, 3)], head_dim=80)
    with pytest.raises(NotImplementedError, match="80"):
        ragged_attention_mosaic(*batch.arrays(), **batch.all_options(), target=H100)


@needs_mosaic_interpreter
def test_mosaic_refuses_a_block_size_that_does_not_fit_its_tiles() -> None:
    batch = Batch([(3, 3)], block_size=24)
    with pytest.raises(NotImplementedError, match="24"):
        ragged_attention_mosaic(*batch.arrays(), **batch.all_options(), target=H100)


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="this jax is new enough")
def test_mosaic_refuses_an_old_jax() -> None:
    batch = Batch([(3, 3)])
    with pytest.raises(NotImplementedError, match="too old"):
        ragged_attention_mosaic(*batch.arrays(), **batch.all_options(), target=H100)


LARGE = {
    "prompts": Batch([(700, 700), (513, 513), (64, 64), (1, 1)], block_size=16),
    "chunks": Batch([(300, 1500), (129, 4000), (8, 900)], block_size=16),
    "mixed_with_decode_rows": Batch(
        [(1, 500)] * 37 + [(200, 333), (5, 5), (91, 2000)],
        num_decode_rows=37,
        block_size=16,
        padding_tokens=30,
        padding_rows=4,
    ),
    "everything": Batch(
        [(700, 700), (300, 1500)],
        block_size=16,
        options={
            "sliding_window": 333,
            "logits_soft_cap": 20.0,
            "alibi_slopes": 2.0 ** -jnp.arange(1, 9),
            "sinks": jnp.arange(8) - 3.0,
        },
    ),
    "many_short_rows": Batch([(n, n + 3 * n % 50) for n in range(1, 65)], block_size=16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [ragged_attention_triton, ragged_attention_mosaic])
@pytest.mark.parametrize(("head_dim", "num_kv_heads"), [(64, 8), (128, 2), (256, 1)])
@pytest.mark.parametrize("name", LARGE)
def test_compiled_kernel_equals_the_reference(
    attention: Any, head_dim: int, num_kv_heads: int, name: str
) -> None:
    batch = replace(LARGE[name], num_heads=8, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check(batch, jax.jit(partial(attention, **batch.all_options(), target=H100))(*batch.arrays()))
