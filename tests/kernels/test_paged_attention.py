"""The public op: what its callers rely on, for the implementations that run here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention import paged_attention
from jaxengine.pallas_kernels.target import Target

from tests.kernels.problems import (
    Problem,
    decode_problem,
    expected,
    keywords,
    make_problem,
    tolerance,
)

HERE = Target.of(jax.devices()[0])

IMPLEMENTATIONS = [
    pytest.param("reference", jnp.float32),
    pytest.param("xla", jnp.float32),
    *[
        pytest.param(name, dtype, marks=pytest.mark.gpu)
        for name in (None, "xla", "triton", "mosaic")
        for dtype in (jnp.bfloat16, jnp.float16)
    ],
]
every_implementation = pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
ALIBI = jnp.asarray([2.0 ** -(n + 1) for n in range(6)], jnp.float32)
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 30},
    "cap_and_alibi": {"logits_soft_cap": 2.0, "alibi_slopes": ALIBI},
    "sinks": {"sinks": jnp.asarray([3.0, -1.0, 0.0, 7.0, 1.0, 2.0])},
}


def run(
    problem: Problem,
    implementation: str | None,
    *,
    decode_only: bool = False,
    target: Target = HERE,
    **scoring,
) -> jax.Array:
    how = keywords(problem, **scoring)

    def attend(*arrays: jax.Array) -> jax.Array:
        return paged_attention(
            *arrays, implementation=implementation, decode_only=decode_only, target=target, **how
        )

    return jax.jit(attend)(*problem).astype(jnp.float32)


@every_implementation
@pytest.mark.parametrize("name", OPTIONS)
def test_a_mixed_step_equals_the_reference(implementation: str, dtype, name: str) -> None:
    rows = [(1, 20), (1, 300), (50, 50), (3, 200), (270, 333), (2, 2), (0, 0)]
    problem = make_problem(rows, padding_tokens=9, dtype=dtype)
    got = run(problem, implementation, **OPTIONS[name])
    want = expected(problem, **OPTIONS[name])
    np.testing.assert_allclose(got, want, atol=tolerance(problem))


@every_implementation
def test_padding_tokens_give_zero(implementation: str, dtype) -> None:
    got = run(make_problem([(1, 5), (4, 9)], padding_tokens=3, dtype=dtype), implementation)
    assert not got[5:].any()
    assert got[:5].any(axis=(1, 2)).all()


@every_implementation
def test_decode_only_reads_neither_query_starts_nor_row_counts(implementation: str, dtype) -> None:
    problem = decode_problem([70, 0, 33], dtype=dtype)
    junk = problem._replace(
        query_start_loc=jnp.full((4,), -1, jnp.int32), num_decode_rows=jnp.int32(-1)
    )
    got = run(junk, implementation, decode_only=True)
    np.testing.assert_allclose(got, expected(problem), atol=tolerance(problem))


@every_implementation
def test_a_row_gives_the_same_whatever_shares_its_batch(implementation: str, dtype) -> None:
    together = make_problem([(1, 40), (20, 60)], dtype=dtype)
    alone = together._replace(
        q=together.q[1:],
        block_tables=together.block_tables[1:],
        seq_lens=together.seq_lens[1:],
        query_start_loc=jnp.asarray([0, 20], jnp.int32),
        num_decode_rows=jnp.int32(0),
    )
    np.testing.assert_allclose(
        run(together, implementation)[1:], run(alone, implementation), atol=tolerance(alone)
    )


@every_implementation
def test_there_may_be_more_rows_than_tokens(implementation: str, dtype) -> None:
    problem = make_problem([(1, 40), (2, 7), (0, 0), (0, 0), (0, 0)], dtype=dtype)
    got = run(problem, implementation)
    np.testing.assert_allclose(got, expected(problem), atol=tolerance(problem))


@settings(max_examples=25, deadline=None)
@given(
    decode_lens=st.lists(st.integers(1, 380), max_size=3),
    ragged=st.lists(st.tuples(st.integers(2, 40), st.integers(0, 300)), max_size=3),
    seed=st.integers(0, 99),
)
def test_xla_equals_the_reference_on_random_steps(
    decode_lens: list[int], ragged: list[tuple[int, int]], seed: int
) -> None:
    rows = [(1, n) for n in decode_lens] + [(n, n + context) for n, context in ragged]
    rows += [(0, 0)] * (6 - len(rows))
    padding_tokens = 123 - sum(query_len for query_len, _ in rows)  # one shape, one compilation
    problem = make_problem(
        rows, padding_tokens=padding_tokens, num_kv_heads=1, group=2, head_dim=16, seed=seed
    )
    num_blocks = 6 * 24 + 5
    grow = [(0, num_blocks - problem.k_cache.shape[0]), (0, 0), (0, 0), (0, 0)]
    problem = problem._replace(
        k_cache=jnp.pad(problem.k_cache, grow), v_cache=jnp.pad(problem.v_cache, grow)
    )
    got, want = RANDOM_STEP_XLA(*problem), RANDOM_STEP_REFERENCE(*problem)
    np.testing.assert_allclose(got, want, atol=1e-5)


def _random_step(implementation: str):
    options = AttentionOptions(0.25)
    return jax.jit(lambda *arrays: paged_attention(
        *arrays, options=options, target=HERE, implementation=implementation))  # fmt: skip


RANDOM_STEP_XLA = _random_step("xla")
RANDOM_STEP_REFERENCE = _random_step("reference")


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(ValueError, match="'cudnn' is not one of reference, xla, triton, mosaic"):
        run(decode_problem([3]), "cudnn")


def test_heads_that_do_not_divide_are_named() -> None:
    problem = decode_problem([3])
    with pytest.raises(ValueError, match="5 query heads do not divide by 2 KV heads"):
        run(problem._replace(q=problem.q[:, :5]), "xla")


def test_a_dtype_other_than_the_caches_is_named() -> None:
    problem = decode_problem([3])
    with pytest.raises(ValueError, match="q is bfloat16, k_cache float32"):
        run(problem._replace(q=problem.q.astype(jnp.bfloat16)), "xla")


def test_a_named_backend_that_refuses_the_shape_says_why() -> None:
    with pytest.raises(NotImplementedError, match="Triton decode takes bfloat16 or float16"):
        run(decode_problem([3], dtype=jnp.float32), "triton", decode_only=True)


def test_the_next_backend_is_asked_when_one_refuses() -> None:
    problem = decode_problem([70, 5], dtype=jnp.float32)  # no kernel takes float32
    got = run(problem, None, decode_only=True, target=Target("gpu"))
    np.testing.assert_allclose(got, expected(problem), atol=tolerance(problem))


def test_the_reference_of_a_target_is_differentiable() -> None:
    problem = decode_problem([7, 3], head_dim=16)
    target = Target("cpu", implementation="reference")

    def loss(q: jax.Array) -> jax.Array:
        return run(problem._replace(q=q), None, target=target).sum()

    step = 1e-2 * jnp.ones_like(problem.q)
    slope = (jax.grad(loss)(problem.q) * step).sum()
    difference = (loss(problem.q + step) - loss(problem.q - step)) / 2
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_numbers_of_other_heads_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is \(5,\), not one for 6 heads"):
        run(decode_problem([3]), "xla", **{name: jnp.ones(5)})


@pytest.mark.parametrize(
    ("option", "complaint"),
    [({"sliding_window": 0}, "sliding_window is 0"), ({"logits_soft_cap": -1.0}, "cap is -1.0")],
)
def test_options_without_meaning_are_refused(option: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        run(decode_problem([3]), "xla", **option)
