"""The error function and the exact gelu, from what every kernel language has."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; error below 1.5e-7.
_P = 0.3275911
_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def erf(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Error function of float32 numbers, to 1.5e-7."""
    magnitude = jnp.abs(x)
    t = 1.0 / (1.0 + _P * magnitude)
    polynomial = jnp.zeros_like(t)
    for coefficient in _COEFFICIENTS:
        polynomial = (polynomial + coefficient) * t
    result = 1.0 - polynomial * jnp.exp(-magnitude * magnitude)
    return jnp.where(x < 0, -result, result)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x * Phi(x)`` of float32 numbers (arXiv:1606.08415), not its tanh approximation."""
    return 0.5 * x * (1.0 + erf(x * jax.lax.rsqrt(jnp.float32(2.0))))
