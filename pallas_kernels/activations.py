"""Activation functions by HF's names, in forms that XLA, Triton and Mosaic all compile."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Of Abramowitz and Stegun, formula 7.1.26: the error is below 1.5e-7.
ERF_P = 0.3275911
ERF_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def erf(x: jax.Array) -> jax.Array:
    """Return the error function by elementary operations, in float32: Triton has none of its own.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    t = 1.0 / (1.0 + ERF_P * jnp.abs(x))
    polynomial = jnp.zeros_like(t)
    for coefficient in reversed(ERF_COEFFICIENTS):
        polynomial = (polynomial + coefficient) * t
    magnitude = 1.0 - polynomial * jnp.exp(-x * x)
    return jnp.where(x < 0, -magnitude, magnitude)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_by_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu_squared(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_new": _gelu_by_tanh,
    "gelu_pytorch_tanh": _gelu_by_tanh,
    "gelu_fast": _gelu_by_tanh,  # the same formula, its constants written out
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _relu_squared,
}


def _gelu_in_kernel(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


# In float32, where a kernel cannot take the function above.
KERNEL_ACTIVATIONS = {**ACTIVATIONS, "gelu": _gelu_in_kernel}
