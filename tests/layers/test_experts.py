"""A layer of experts equals a loop over its tokens, and pays for no expert that none needs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxengine.convert.model_spec import ExpertsSpec, FeedForwardSpec, RouterSpec
from jaxengine.pallas_kernels.residual_norm import sum_addends
from jaxengine.pallas_kernels.target import Target

from jaxengine.layers import experts as experts_module
from jaxengine.layers.experts import Experts
from jaxengine.layers.routing_counts import counting_routing
from jaxengine.sharding import make_mesh

D, F, E, K = 8, 12, 6, 2
SPEC = ExpertsSpec(E, K, F, "silu", RouterSpec(is_normalised=True))


def make_layer(spec: ExpertsSpec = SPEC) -> Experts:
    """A layer of random weights."""
    layer = Experts(D, spec, dtype=jnp.float32, num_shards=1, target=Target())
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
        variable.set_value(
            jnp.asarray(rng.standard_normal(variable.get_value().shape), jnp.float32)
        )
    return layer


def tokens(count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, D)), jnp.float32)


def on_one_device(serve: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.shard_map(
        serve,
        mesh=make_mesh(jax.devices()[:1]),
        in_specs=(P(), P(), P()),
        out_specs=P(),
        check_vma=False,
    )


def run(layer: Experts, x: jax.Array, is_real: Any = None) -> np.ndarray:
    """The layer's sum, on one device."""
    graph, state = nnx.split(layer)
    is_real = jnp.ones(x.shape[0], bool) if is_real is None else jnp.asarray(is_real)

    def serve(state: Any, x: jax.Array, is_real: jax.Array) -> jax.Array:
        addends = nnx.merge(graph, state).addends(x, is_real=is_real)
        return sum_addends(addends, jnp.float32)

    return np.asarray(jax.jit(on_one_device(serve))(state, x, is_real))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expected(layer: Experts, x: jax.Array) -> np.ndarray:
    """Token by token and expert by expert, in float64."""

    def wide(parameter: Any) -> np.ndarray:
        return np.asarray(parameter[...], np.float64)

    router, gate_up, down = wide(layer.router), wide(layer.gate_up), wide(layer.down)
    out = []
    for row in np.asarray(x, np.float64):
        logits = router @ row
        best = np.argsort(-logits)[:K]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        outputs = [down[e] @ (silu(gate_up[e, 0] @ row) * (gate_up[e, 1] @ row)) for e in best]
        total = sum(w * output for w, output in zip(weights, outputs, strict=True))
        if layer.shared is not None and layer.shared_gate is not None:
            assert layer.shared.gate_up_proj is not None
            up = wide(layer.shared.gate_up_proj.weight)
            shared = wide(layer.shared.down_proj.weight) @ (silu(up[0] @ row) * (up[1] @ row))
            total = total + shared / (1 + np.exp(-wide(layer.shared_gate)[0] @ row))
        out.append(total)
    return np.stack(out)


def test_a_token_gets_what_its_experts_make_of_it() -> None:
    layer, x = make_layer(), tokens(9)
    np.testing.assert_allclose(run(layer, x), expected(layer, x), rtol=2e-4, atol=2e-4)


def test_a_gated_layer_serves_every_token_beside_the_experts() -> None:
    spec = ExpertsSpec(
        E, K, F, "silu", SPEC.router, shared=FeedForwardSpec(10, "silu"), has_shared_gate=True
    )
    layer, x = make_layer(spec), tokens(9)
    np.testing.assert_allclose(run(layer, x), expected(layer, x), rtol=2e-4, atol=2e-4)


def test_padding_goes_to_no_expert() -> None:
    layer, x = make_layer(), tokens(4)
    with counting_routing() as counts:
        found = run(layer, x, [True, False, False, False])
    np.testing.assert_allclose(found[:1], expected(layer, x[:1]), rtol=2e-4, atol=2e-4)
    assert (found[1:] == 0).all()
    assert (counts.num_layer_steps, counts.mean_touched, counts.mean_rows) == (1, K, K)


def test_a_long_step_is_served_in_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(), tokens(16)
    monkeypatch.setattr(experts_module, "MAX_ROWS", 8)  # 4 tokens of 2 experts
    with counting_routing() as counts:
        found = run(layer, x)
    np.testing.assert_allclose(found, expected(layer, x), rtol=2e-4, atol=2e-4)
    assert (counts.num_layer_steps, counts.mean_rows) == (4, 8)


def test_routing_16384_tokens_needs_no_more_memory_than_half_of_them() -> None:
    spec = ExpertsSpec(32, 8, 16, "silu")
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Experts(64, spec, dtype=jnp.float32, num_shards=1, target=Target()))
    )

    def serve(state: Any, x: jax.Array, is_real: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).addends(x, is_real=is_real).arrays[0]

    def temp_bytes(count: int) -> int:
        x, is_real = jnp.float32, jnp.bool
        shapes = jax.ShapeDtypeStruct((count, 64), x), jax.ShapeDtypeStruct((count,), is_real)
        compiled = jax.jit(on_one_device(serve)).lower(state, *shapes).compile()
        analysis: Any = compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    # Beside the rows of a go there are each token's scores, input and output.
    per_token = 4 * (3 * 64 + 3 * 32 + 4 * 8)
    assert temp_bytes(16384) < temp_bytes(8192) + 8192 * per_token
