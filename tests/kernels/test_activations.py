"""Activation functions, in the forms that kernels compute, equal their formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.activations import ACTIVATIONS, KERNEL_ACTIVATIONS, erf

X = np.linspace(-9, 9, 2001)


def gelu_by_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": gelu_by_tanh,
    "gelu_pytorch_tanh": gelu_by_tanh,
    "gelu_fast": lambda x: 0.5 * x * (1 + math.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


def test_the_error_function_is_as_exact_as_its_source_says() -> None:
    exact = np.array([math.erf(x) for x in X])
    # 1.5e-7 of the formula, and float32 rounds numbers near 1 by 6e-8, several times.
    assert np.abs(np.asarray(erf(jnp.asarray(X, jnp.float32))) - exact).max() < 6e-7


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("functions", [ACTIVATIONS, KERNEL_ACTIVATIONS], ids=["xla", "kernels"])
def test_every_activation_is_its_formula(functions: dict, name: str) -> None:
    exact = np.array([FORMULAS[name](x) for x in X])
    found = np.asarray(functions[name](jnp.asarray(X, jnp.float32)))
    np.testing.assert_allclose(found, exact, rtol=2e-5, atol=3e-6)
