"""Sum of a product's parts, residual added, normalised, in plain jnp: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sum_parts(
    parts: Float[Array, "S *shape"],  # noqa: F821
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*shape"]:
    """Add up in float32, round once."""
    if parts.shape[0] == 1:
        return parts[0].astype(dtype)
    return parts.astype(jnp.float32).sum(axis=0).astype(dtype)


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*rows D"]:
    """``x / rms(x) * weight`` over the last axis, computed in float32.

    Source: arXiv:1910.07467. The product with the weight is taken after the cast, as HF does.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def residual_norm_reference(
    parts: Float[Array, "S T D"],
    residual: Float[Array, "T D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    axis_name: str,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """As ``residual_norm``."""
    total = residual + jax.lax.psum(sum_parts(parts, residual.dtype), axis_name)
    return total, rms_norm(total, weight, eps)
