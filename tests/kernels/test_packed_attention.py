"""Attention of packed sequences: every implementation equals the dense specification."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.packed_attention import packed_attention
from jaxengine.pallas_kernels.packed_attention_reference import packed_attention_reference
from jaxengine.pallas_kernels.packed_attention_triton import packed_attention_triton
from jaxengine.pallas_kernels.ragged_attention_triton import RaggedTritonConfig
from jaxengine.pallas_kernels.target import Target

from tests.kernels.h100 import lower_for_cuda
from tests.kernels.problems import H100

CPU = Target("cpu")
SMALL = RaggedTritonConfig(rows=32, tile_kv=16, num_warps=4, num_stages=2)
LENGTHS = [5, 0, 40, 17, 1]
# KV heads, group, head_dim, options
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "mha-32": (3, 1, 32, {}),
    "gqa-64-window": (2, 3, 64, {"sliding_window": 9}),
    "mqa-128-cap": (1, 4, 128, {"logits_soft_cap": 2.0}),
    "mha-80-window-of-one": (2, 1, 80, {"sliding_window": 1}),
}


def problem(
    num_kv_heads: int,
    group: int,
    head_dim: int,
    lengths: list[int] = LENGTHS,
    padding: int = 6,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(sum(lengths))
    num_tokens = sum(lengths) + padding
    q, k, v = (
        jnp.asarray(rng.standard_normal((num_tokens, heads, head_dim)), dtype)
        for heads in (num_kv_heads * group, num_kv_heads, num_kv_heads)
    )
    return q, k, v, jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


def loop_over_rows(
    arrays: tuple[jax.Array, ...], options: AttentionOptions, is_causal: bool
) -> np.ndarray:
    """The formula, token by token in float64."""
    q, k, v = (np.asarray(array, np.float64) for array in arrays[:3])
    group, out = q.shape[1] // k.shape[1], np.zeros(q.shape)
    for start, stop in itertools.pairwise(np.asarray(arrays[3])):
        for t in range(start, stop):
            window = options.sliding_window or stop
            first = max(start, t - window + 1)
            last = t if is_causal else min(stop - 1, t + window - 1)
            for n in range(q.shape[1]):
                scores = options.scale * k[first : last + 1, n // group] @ q[t, n]
                if options.logits_soft_cap is not None:
                    scores = options.logits_soft_cap * np.tanh(scores / options.logits_soft_cap)
                weights = np.exp(scores - scores.max())
                out[t, n] = weights / weights.sum() @ v[first : last + 1, n // group]
    return out


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_xla_and_the_reference_equal_the_formula(
    implementation: str, name: str, is_causal: bool
) -> None:
    *shape, scoring = CASES[name]
    arrays, options = problem(*shape), AttentionOptions(0.2, **scoring)
    found = packed_attention(
        *arrays, options=options, is_causal=is_causal, target=CPU, implementation=implementation
    )
    np.testing.assert_allclose(found, loop_over_rows(arrays, options, is_causal), atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference(name: str, is_causal: bool) -> None:
    *shape, scoring = CASES[name]
    arrays = problem(*shape, dtype=jnp.bfloat16)
    how = {"options": AttentionOptions(0.2, **scoring), "is_causal": is_causal}
    found = packed_attention_triton(*arrays, **how, target=H100, config=SMALL, interpret=True)
    expected = packed_attention_reference(*arrays, **how)
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2, rtol=2e-2
    )
    assert not found[sum(LENGTHS) :].any()  # padding


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_compiled_triton_equals_the_reference(name: str, is_causal: bool, dtype: Any) -> None:
    *shape, scoring = CASES[name]
    arrays = problem(*shape, lengths=[700, 3, 512, 64, 0, 129], padding=30, dtype=dtype)
    how = {"options": AttentionOptions(0.2, **scoring), "is_causal": is_causal}
    found = jax.jit(functools.partial(packed_attention_triton, **how, target=H100))(*arrays)
    expected = packed_attention_reference(*arrays, **how)
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2, rtol=2e-2
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=4, max_size=4), st.booleans())
def test_xla_equals_the_reference_on_random_rows(lengths: list[int], is_causal: bool) -> None:
    arrays = problem(1, 2, 16, lengths, padding=370 - sum(lengths))  # one shape, one compilation
    np.testing.assert_allclose(
        RANDOM["xla", is_causal](*arrays), RANDOM["reference", is_causal](*arrays), atol=1e-5
    )


RANDOM = {
    (name, is_causal): jax.jit(
        functools.partial(
            packed_attention,
            options=AttentionOptions(0.25, sliding_window=40),
            is_causal=is_causal,
            target=CPU,
            implementation=name,
        )
    )
    for name in ("xla", "reference")
    for is_causal in (False, True)
}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 64, "logits_soft_cap": 9.0}], ids=str)
def test_triton_lowers_for_cuda(head_dim: int, options: dict[str, Any]) -> None:
    def run(*arrays: jax.Array) -> jax.Array:
        how = AttentionOptions(0.1, **options)
        return packed_attention(*arrays, options=how, target=H100, implementation="triton")

    shapes = [((256, 12, head_dim), jnp.bfloat16)] * 3 + [((9,), jnp.int32)]
    arrays = [jax.ShapeDtypeStruct(dims, dtype) for dims, dtype in shapes]
    assert "packed_attention" in lower_for_cuda(run, *arrays)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"implementation": "mosaic"}, "'mosaic' is not one of reference, xla, triton"),
        ({"k": jnp.zeros((9, 2, 16))}, r"k is \(9, 2, 16\) but v is \(9, 1, 16\)"),
        ({"q": jnp.zeros((9, 2, 16), jnp.bfloat16)}, "q is bfloat16, k float32"),
        ({"q": jnp.zeros((8, 2, 16))}, r"q is \(8, 2, 16\) but k is \(9, 1, 16\)"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], complaint: str) -> None:
    arrays = dict(zip(("q", "k", "v", "query_start_loc"), problem(1, 2, 16, [9], 0), strict=True))
    with pytest.raises(ValueError, match=complaint):
        packed_attention(**{**arrays, "options": AttentionOptions(1.0), "target": CPU, **change})
