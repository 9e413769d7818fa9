"""Products of groups of rows equal a loop over the rows, whatever serves them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.grouped_product import (
    Gating,
    grouped_gated_product,
    grouped_product,
)
from jaxengine.pallas_kernels.grouped_product_triton import (
    GATED_CONFIGS,
    PLAIN_CONFIGS,
    GroupedConfig,
    grouped_gated_product_triton,
    grouped_product_triton,
)
from jaxengine.pallas_kernels.grouped_tiles import build_grouped_tiles, max_tiles
from jaxengine.pallas_kernels.target import Target

from tests.kernels.h100 import lower_for_cuda

CPU = Target("cpu")
H100 = Target("gpu", "hopper")
SIZES = (3, 0, 5, 1, 0, 17)  # two groups have no rows
NUM_ROWS = 29  # three more than the groups have
GATINGS = {"silu": Gating("silu"), "clamped": Gating(limit=0.7, alpha=1.702)}


def arrays(
    *, num_out: int = 16, num_in: int = 32, parts: int = 1, dtype: Any = jnp.float32
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    E = len(SIZES)
    shape = (E, num_out, num_in) if parts == 1 else (E, parts, num_out, num_in)
    weight = rng.standard_normal(shape) / num_in**0.5
    return {
        "x": jnp.asarray(rng.standard_normal((NUM_ROWS, num_in)), dtype),
        "weight": jnp.asarray(weight, dtype),
        "group_sizes": jnp.asarray(SIZES, jnp.int32),
        "bias": jnp.asarray(rng.standard_normal(shape[:-1]), dtype),
    }


def wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def expected_product(given: dict[str, Any], row_weights: Any = None) -> np.ndarray:
    """Row by row, in float64."""
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    x, weight, bias = wide(given["x"]), wide(given["weight"]), wide(given["bias"])
    rows = [weight[group] @ x[row] + bias[group] for row, group in enumerate(groups)]
    factors = np.ones(len(rows)) if row_weights is None else wide(row_weights)[: len(rows)]
    return np.stack(rows) * factors[:, None]


def expected_gated(given: dict[str, Any], rows: Any, gating: Gating) -> np.ndarray:
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    x, weight, bias = wide(given["x"])[np.asarray(rows)], wide(given["weight"]), wide(given["bias"])
    out = []
    for row, group in enumerate(groups):
        gate, up = (weight[group, half] @ x[row] + bias[group, half] for half in range(2))
        if gating.limit is None:
            out.append(gate / (1 + np.exp(-gate)) * up)
        else:
            gate, up = np.minimum(gate, gating.limit), np.clip(up, -gating.limit, gating.limit)
            out.append((up + 1) * gate / (1 + np.exp(-gating.alpha * gate)))
    return np.stack(out)


def assert_close(found: jax.Array, expected: np.ndarray, dtype: Any = jnp.float32) -> None:
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    served = wide(found)[: len(expected)]
    assert np.linalg.norm(served - expected) < max(tolerance, 1e-6) * np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_row_is_multiplied_with_the_weight_of_its_group(implementation: str) -> None:
    given = arrays()
    row_weights = jnp.linspace(0.1, 2.0, NUM_ROWS)
    found = grouped_product(
        **given, row_weights=row_weights, target=CPU, implementation=implementation
    )
    assert_close(found, expected_product(given, row_weights))


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gate_and_up_become_one(implementation: str, gating: str) -> None:
    given, rows = arrays(parts=2), jnp.arange(NUM_ROWS)[::-1]
    found = grouped_gated_product(
        **given, rows=rows, gating=GATINGS[gating], target=CPU, implementation=implementation
    )
    assert_close(found, expected_gated(given, rows, GATINGS[gating]))


def test_xlas_loop_takes_many_rows_of_a_group_at_once() -> None:
    rng = np.random.default_rng(1)
    sizes = np.array([130, 0, 70])  # tiles of 64: three, none and two
    weight = jnp.asarray(rng.standard_normal((3, 4, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((200, 8)), jnp.float32)
    found = grouped_product(x, weight, jnp.asarray(sizes, jnp.int32), target=CPU)
    groups = np.repeat(np.arange(3), sizes)
    expected = np.einsum("roi,ri->ro", wide(weight)[groups], wide(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


CONFIG = GroupedConfig(tile_rows=16, tile_out=16, tile_in=16, num_stages=2, num_warps=2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_triton_equals_the_loop(dtype: Any) -> None:
    given = arrays(dtype=dtype)
    row_weights = jnp.linspace(0.1, 2.0, NUM_ROWS)
    found = grouped_product_triton(**given, row_weights=row_weights, config=CONFIG, interpret=True)
    assert found.dtype == dtype
    assert_close(found, expected_product(given, row_weights), dtype)


@pytest.mark.parametrize("gating", GATINGS)
def test_the_gated_kernel_gathers_its_rows(gating: str) -> None:
    given, rows = arrays(parts=2, dtype=jnp.bfloat16), jnp.arange(NUM_ROWS)[::-1]
    found = grouped_gated_product_triton(
        **given, rows=rows, gating=GATINGS[gating], config=CONFIG, interpret=True
    )
    assert_close(found, expected_gated(given, rows, GATINGS[gating]), jnp.bfloat16)


def test_every_kernel_activation_of_the_gate_equals_xlas() -> None:
    given = arrays(parts=2, dtype=jnp.bfloat16)
    for activation in ("gelu", "gelu_new", "relu", "quick_gelu"):
        options: dict[str, Any] = {"gating": Gating(activation)}
        found = grouped_gated_product_triton(**given, **options, config=CONFIG, interpret=True)
        expected = grouped_gated_product(**given, **options, target=CPU, implementation="reference")
        assert_close(found, wide(expected)[: sum(SIZES)], jnp.bfloat16)


def test_tiles_lie_in_one_group_each() -> None:
    tiles = build_grouped_tiles(jnp.asarray(SIZES, jnp.int32), NUM_ROWS, 4)
    count = int(tiles.total)
    assert count == 1 + 2 + 1 + 5
    assert tiles.group[:count].tolist() == [0, 2, 2, 3, 5, 5, 5, 5, 5]
    assert tiles.start[:count].tolist() == [0, 3, 7, 8, 9, 13, 17, 21, 25]
    assert tiles.end[:count].tolist() == [3, 8, 8, 9, *[26] * 5]
    assert set(tiles.group[count:].tolist()) == {len(SIZES)}


@pytest.mark.parametrize(("num_rows", "num_groups", "expected"), [(8, 128, 8), (64, 4, 8)])
def test_no_more_tiles_than_any_routing_needs(
    num_rows: int, num_groups: int, expected: int
) -> None:
    assert max_tiles(num_rows, num_groups, 16) == expected


# Experts, their width, the model's width, experts a token.
QWEN3_30B = (128, 768, 2048, 8)
MIXTRAL = (8, 14336, 4096, 2)
SHAPES = {
    "qwen3-30b-a3b": QWEN3_30B,
    "qwen3-30b-a3b, experts over two GPUs": (64, 768, 2048, 8),
    "mixtral-8x7b": MIXTRAL,
    "deepseek-v2-lite": (64, 1408, 2048, 6),
    "gpt-oss-20b": (32, 2880, 2880, 4),
    "olmoe-1b-7b": (64, 1024, 2048, 8),
    "phi-3.5-moe": (16, 6400, 4096, 2),
    "granite-3.1-1b-a400m": (32, 512, 1024, 8),
    "qwen1.5-moe, cut over eight GPUs": (60, 176, 2048, 4),
}


@pytest.mark.parametrize("num_tokens", [1, 8, 64, 256, 1024, 16384])
@pytest.mark.parametrize("model", SHAPES)
def test_triton_serves_every_size_of_published_models(model: str, num_tokens: int) -> None:
    E, F, D, k = SHAPES[model]
    S, R = jax.ShapeDtypeStruct, num_tokens * k
    sizes = S((E,), jnp.int32)
    gated = functools.partial(
        grouped_gated_product, gating=Gating(), target=H100, implementation="triton"
    )
    x, weight = S((num_tokens, D), jnp.bfloat16), S((E, 2, F, D), jnp.bfloat16)
    rows = S((R,), jnp.int32)
    hidden = jax.eval_shape(lambda x, w, s, r: gated(x, w, s, rows=r), x, weight, sizes, rows)
    assert hidden.shape == (R, F)
    plain = functools.partial(grouped_product, target=H100, implementation="triton")
    down = S((E, D, F), jnp.bfloat16)
    assert jax.eval_shape(plain, hidden, down, sizes).shape == (R, D)


def test_triton_refuses_float32_and_the_op_turns_to_xla() -> None:
    given = arrays()
    with pytest.raises(NotImplementedError, match="not of 16 bits"):
        grouped_product(**given, target=H100, implementation="triton")
    assert_close(grouped_product(**given, target=H100), expected_product(given))


@pytest.mark.parametrize("num_tokens", [1, 64, 512, 2048])
def test_both_products_lower_for_cuda(num_tokens: int) -> None:
    E, F, D, k = (32, 768, 2048, 8)
    S, R = jax.ShapeDtypeStruct, num_tokens * k
    bf16, sizes = jnp.bfloat16, S((E,), jnp.int32)

    def both(x: Any, up: Any, up_bias: Any, down: Any, sizes: Any, rows: Any, w: Any) -> Any:
        hidden = grouped_gated_product(
            x, up, sizes, rows=rows, bias=up_bias, gating=Gating(limit=7.0), target=H100
        )
        return grouped_product(hidden, down, sizes, row_weights=w, target=H100)

    text = lower_for_cuda(
        both,
        S((num_tokens, D), bf16),
        S((E, 2, F, D), bf16),
        S((E, 2, F), bf16),
        S((E, D, F), bf16),
        sizes,
        S((R,), jnp.int32),
        S((R,), jnp.float32),
    )
    assert 'name = "grouped_product"' in text
    assert 'name = "grouped_gated_product"' in text


@pytest.mark.parametrize("configs", [GATED_CONFIGS, PLAIN_CONFIGS], ids=["gated", "plain"])
def test_every_shipped_configuration_lowers_for_cuda(configs: Any) -> None:
    S, E, D = jax.ShapeDtypeStruct, 4, 512
    for _, alternatives in configs:
        for config in alternatives:
            if configs is GATED_CONFIGS:
                shapes = S((64, D), jnp.bfloat16), S((E, 2, 256, D), jnp.bfloat16)
                function = functools.partial(
                    grouped_gated_product_triton, gating=Gating(), config=config
                )
            else:
                shapes = S((64, D), jnp.bfloat16), S((E, 256, D), jnp.bfloat16)
                function = functools.partial(grouped_product_triton, config=config)
            text = lower_for_cuda(function, *shapes, S((E,), jnp.int32))
            assert f"num_warps = {config.num_warps}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "implementation 'cuda' is not one of"),
        ({"group_sizes": jnp.zeros(5, jnp.int32)}, r"group_sizes is \(5,\)"),
        ({"x": jnp.zeros((4, 31))}, "x is float32"),
        ({"bias": jnp.zeros((6, 15))}, r"bias is \(6, 15\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_product(**{**arrays(), **change}, target=CPU)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish2' is not supported"):
        Gating("swish2")
