"""The contract of decode attention, stated once and asked of every implementation.

On the CPU the Pallas kernel runs in its interpreter; with ``-m gpu`` it is compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.paged_attention_xla import paged_decode_xla
from jaxengine.pallas_kernels.paged_decode_triton import paged_decode_triton
from jaxengine.pallas_kernels.tiles import DecodeConfig

from tests.kernels.problems import (
    H100,
    Problem,
    decode_problem,
    expected,
    keywords,
    tolerance,
)

ON_CPU = [
    pytest.param("xla", jnp.float32, id="xla-float32"),
    pytest.param("triton", jnp.bfloat16, id="triton-bfloat16"),
]
ON_GPU = [
    pytest.param(name, dtype, id=f"{name}-{jnp.dtype(dtype).name}-compiled", marks=pytest.mark.gpu)
    for name in ("xla", "triton")
    for dtype in (jnp.bfloat16, jnp.float16)
]
every_implementation = pytest.mark.parametrize(("implementation", "dtype"), [*ON_CPU, *ON_GPU])

ALIBI = jnp.asarray([2.0 ** -(n + 1) for n in range(6)], jnp.float32)
SINKS = jnp.asarray([3.0, -1.0, 0.0, 7.0, 1.0, 2.0], jnp.bfloat16)
SHAPES_AND_SCORING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa-64-sinks": ({"group": 3, "head_dim": 64}, {"sinks": SINKS}),
    "mha-80-window": ({"group": 1, "head_dim": 80}, {"sliding_window": 37}),
    "mqa-96-alibi": (
        {"num_kv_heads": 1, "group": 6, "head_dim": 96, "block_size": 24},
        {"alibi_slopes": ALIBI},
    ),
    "gqa-112-window-sinks": ({"head_dim": 112}, {"sliding_window": 100, "sinks": SINKS}),
    "gqa-128-cap": ({"group": 4, "head_dim": 128, "block_size": 32}, {"logits_soft_cap": 2.0}),
    "mqa-256-everything": (
        {"num_kv_heads": 1, "group": 6, "head_dim": 256, "block_size": 8, "table_width": 48},
        {"sliding_window": 100, "logits_soft_cap": 5.0, "alibi_slopes": ALIBI, "sinks": SINKS},
    ),
    "mqa-64-many-heads": ({"num_kv_heads": 1, "group": 128, "head_dim": 64}, {}),
    "gqa-64-block-128": ({"head_dim": 64, "block_size": 128, "table_width": 3}, {}),
}
SMALL = DecodeConfig(tile_kv=64, num_stages=2, splits_per_sm=1 / 8, min_split_tokens=64)


def compiled(
    problem: Problem, implementation: str, config: DecodeConfig | None = None, **scoring: Any
) -> Callable[..., jax.Array]:
    """A backend as it runs here, for problems of this shape."""
    how = {**keywords(problem, **scoring), "target": H100}
    if implementation == "xla":
        return jax.jit(functools.partial(paged_decode_xla, **how))
    if jax.default_backend() == "cpu":  # few programs: the interpreter is slow
        how |= {"config": config or SMALL, "interpret": True}
    else:
        how["config"] = config
    return jax.jit(functools.partial(paged_decode_triton, **how))


def run(
    problem: Problem, implementation: str, config: DecodeConfig | None = None, **scoring: Any
) -> jax.Array:
    decode = compiled(problem, implementation, config, **scoring)
    return decode(*problem.decode_arguments).astype(jnp.float32)


@every_implementation
@pytest.mark.parametrize("name", SHAPES_AND_SCORING)
def test_decode_equals_the_reference(implementation: str, dtype: Any, name: str) -> None:
    shape, scoring = SHAPES_AND_SCORING[name]
    problem = decode_problem([1, 17, 64, 300, 129], dtype=dtype, **shape)
    got = run(problem, implementation, **scoring)
    np.testing.assert_allclose(got, expected(problem, **scoring), atol=tolerance(problem))


@every_implementation
@pytest.mark.parametrize("scoring", [{}, {"sinks": SINKS}], ids=["plain", "sinks"])
def test_a_padding_row_gives_zero(implementation: str, dtype: Any, scoring: dict[str, Any]) -> None:
    problem = decode_problem([5, 0, 40, 0], dtype=dtype)
    got = run(problem, implementation, **scoring)
    assert not got[jnp.array([1, 3])].any()
    assert got[jnp.array([0, 2])].any(axis=(1, 2)).all()


@every_implementation
@pytest.mark.parametrize("scoring", [{}, {"sinks": SINKS}], ids=["plain", "sinks"])
def test_a_long_row_is_split_and_merged_exactly(
    implementation: str, dtype: Any, scoring: dict[str, Any]
) -> None:
    problem = decode_problem([384, 3, 200], dtype=dtype)
    got = run(problem, implementation, SMALL, **scoring)
    np.testing.assert_allclose(got, expected(problem, **scoring), atol=tolerance(problem))


@every_implementation
def test_blocks_of_other_rows_do_not_matter(implementation: str, dtype: Any) -> None:
    problem = decode_problem([20, 33], dtype=dtype)
    used = np.unique(problem.block_tables)[1:]
    unused = np.setdiff1d(np.arange(problem.k_cache.shape[0]), used)
    other = problem._replace(
        k_cache=problem.k_cache.at[unused].set(-3e4),
        v_cache=problem.v_cache.at[unused].set(-3e4),
    )
    decode = compiled(problem, implementation)
    assert (decode(*problem.decode_arguments) == decode(*other.decode_arguments)).all()


def test_a_sink_takes_its_share_of_the_softmax_and_has_no_value() -> None:
    problem = decode_problem([1], num_kv_heads=1, group=1, head_dim=16)
    only_value = problem.v_cache[problem.block_tables[0, 0], 0, 0]
    score = 0.25 * float(problem.q[0, 0] @ problem.k_cache[problem.block_tables[0, 0], 0, 0])
    got = expected(problem, sinks=jnp.asarray([score + np.log(3.0)]))
    np.testing.assert_allclose(got[0, 0], only_value / 4, rtol=1e-5)  # 1 of 1 + 3


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_decode_equals_the_reference_on_many_random_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seq_lens = rng.integers(0, rng.choice([40, 700, 6000]), rng.integers(1, 200)).tolist()
    group, num_kv_heads = int(rng.choice([1, 3, 4, 8])), int(rng.choice([1, 3, 8]))
    problem = decode_problem(
        seq_lens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=int(rng.choice([64, 80, 96, 112, 128, 256])),
        table_width=512,
        dtype=jnp.bfloat16,
        seed=seed,
    )
    scoring = {"sinks": jnp.asarray(rng.standard_normal(group * num_kv_heads))} if seed % 2 else {}
    got = run(problem, "triton", **scoring)
    np.testing.assert_allclose(got, expected(problem, **scoring), atol=tolerance(problem))
