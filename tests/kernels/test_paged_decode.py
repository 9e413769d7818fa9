"""The contract of decode attention, stated once and asked of every implementation.

On the CPU the Pallas kernels run in their interpreters; with ``-m gpu`` they are compiled.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxengine.pallas_kernels.paged_attention_xla import paged_decode_xla
from jaxengine.pallas_kernels.paged_decode_mosaic import paged_decode_mosaic
from jaxengine.pallas_kernels.paged_decode_triton import paged_decode_triton
from jaxengine.pallas_kernels.tiles import DecodeConfig

from tests.kernels.problems import Problem, decode_problem, expected, scale, tolerance

needs_mosaic_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic's GPU interpreter came with jax 0.11"
)
ON_CPU = [
    pytest.param("xla", jnp.float32, id="xla-float32"),
    pytest.param("triton", jnp.bfloat16, id="triton-bfloat16"),
    pytest.param("mosaic", jnp.bfloat16, id="mosaic-bfloat16", marks=needs_mosaic_interpreter),
]
ON_GPU = [
    pytest.param(name, dtype, id=f"{name}-{jnp.dtype(dtype).name}-compiled", marks=pytest.mark.gpu)
    for name in ("xla", "triton", "mosaic")
    for dtype in (jnp.bfloat16, jnp.float16)
]
every_implementation = pytest.mark.parametrize(("implementation", "dtype"), [*ON_CPU, *ON_GPU])

ALIBI = jnp.asarray([2.0 ** -(n + 1) for n in range(6)], jnp.float32)
SHAPES_AND_OPTIONS = {
    "gqa-64": ({"group": 3, "head_dim": 64}, {}),
    "mha-80-window": ({"group": 1, "head_dim": 80}, {"sliding_window": 37}),
    "mqa-96-alibi": (
        {"num_kv_heads": 1, "group": 6, "head_dim": 96, "block_size": 24},
        {"alibi_slopes": ALIBI},
    ),
    "gqa-128-cap": ({"group": 4, "head_dim": 128, "block_size": 32}, {"logits_soft_cap": 2.0}),
    "mqa-256-window-cap-alibi": (
        {"num_kv_heads": 1, "group": 6, "head_dim": 256, "block_size": 8, "table_width": 48},
        {"sliding_window": 100, "logits_soft_cap": 5.0, "alibi_slopes": ALIBI},
    ),
    "mqa-64-many-heads": ({"num_kv_heads": 1, "group": 40, "head_dim": 64}, {}),
    "gqa-64-block-128": ({"head_dim": 64, "block_size": 128, "table_width": 3}, {}),
}
SMALL = DecodeConfig(tile_kv=64, num_stages=2, splits_per_sm=1 / 8, min_split_tokens=64)


def compiled(problem: Problem, implementation: str, config: DecodeConfig | None = None, **options):
    """A backend as it runs here, for problems of this shape."""
    function: Callable[..., jax.Array] = {
        "xla": paged_decode_xla,
        "triton": paged_decode_triton,
        "mosaic": paged_decode_mosaic,
    }[implementation]
    if implementation != "xla":
        if jax.default_backend() == "cpu":  # few programs: the interpreters are slow
            config = config or SMALL
            mosaic_interpreter = getattr(plgpu, "InterpretGPUParams", bool)
            options["interpret"] = True if implementation == "triton" else mosaic_interpreter()
        options["config"] = config
    return jax.jit(functools.partial(function, scale=scale(problem), **options))


def run(problem: Problem, implementation: str, config: DecodeConfig | None = None, **options):
    """Attention of a problem; a refused shape is skipped with the backend's reason."""
    try:
        decode = compiled(problem, implementation, config, **options)
        return decode(*problem.decode_arguments).astype(jnp.float32)
    except NotImplementedError as refusal:
        pytest.skip(f"{implementation} refuses: {refusal}")


@every_implementation
@pytest.mark.parametrize("name", SHAPES_AND_OPTIONS)
def test_decode_equals_the_reference(implementation: str, dtype, name: str) -> None:
    shape, options = SHAPES_AND_OPTIONS[name]
    problem = decode_problem([1, 17, 64, 300, 129], dtype=dtype, **shape)
    got = run(problem, implementation, **options)
    np.testing.assert_allclose(got, expected(problem, **options), atol=tolerance(problem))


@every_implementation
def test_a_padding_row_gives_zero(implementation: str, dtype) -> None:
    problem = decode_problem([5, 0, 40, 0], dtype=dtype)
    got = run(problem, implementation)
    assert not got[jnp.array([1, 3])].any()
    assert got[jnp.array([0, 2])].any(axis=(1, 2)).all()


@every_implementation
def test_a_long_row_is_split_and_merged_exactly(implementation: str, dtype) -> None:
    problem = decode_problem([384, 3, 200], dtype=dtype)
    got = run(problem, implementation, SMALL)
    np.testing.assert_allclose(got, expected(problem), atol=tolerance(problem))


@every_implementation
def test_blocks_of_other_rows_do_not_matter(implementation: str, dtype) -> None:
    problem = decode_problem([20, 33], dtype=dtype)
    used = np.unique(problem.block_tables)[1:]
    unused = np.setdiff1d(np.arange(problem.k_cache.shape[0]), used)
    other = problem._replace(
        k_cache=problem.k_cache.at[unused].set(-3e4),
        v_cache=problem.v_cache.at[unused].set(-3e4),
    )
    decode = compiled(problem, implementation)
    assert (decode(*problem.decode_arguments) == decode(*other.decode_arguments)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_decode_equals_the_reference_on_many_random_rows(implementation: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seq_lens = rng.integers(0, rng.choice([40, 700, 6000]), rng.integers(1, 200)).tolist()
    problem = decode_problem(
        seq_lens,
        num_kv_heads=int(rng.choice([1, 3, 8])),
        group=int(rng.choice([1, 3, 4, 8])),
        head_dim=int(rng.choice([64, 128])),
        table_width=512,
        dtype=jnp.bfloat16,
        seed=seed,
    )
    got = run(problem, implementation)
    np.testing.assert_allclose(got, expected(problem), atol=tolerance(problem))


def test_kernel_modules_import_without_a_gpu() -> None:
    for module in ("paged_decode_triton", "paged_decode_mosaic"):
        assert importlib.import_module(f"jaxengine.pallas_kernels.{module}")
