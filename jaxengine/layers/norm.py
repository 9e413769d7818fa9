"""Root-mean-square normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.layers.linear import parameter


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight`` over the last axis, computed in float32.

    Source: arXiv:1910.07467. The product with the weight is taken after the cast, as HF does.
    """

    def __init__(self, size: int, *, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.weight = parameter((size,), dtype, P(None), init="ones")

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype) * self.weight[...]
