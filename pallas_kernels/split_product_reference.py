"""The split product in plain jnp: the specification, in a single part."""

import jax
from jaxtyping import Array, Float


def project(x: Float[Array, "T I"], weight: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """``x W^T``, accumulated in float32 by the matrix unit, returned in x's dtype."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def split_product_reference(
    x: Float[Array, "T I"], weight: Float[Array, "O I"]
) -> Float[Array, "1 T O"]:
    """As ``split_product``."""
    return project(x, weight)[None]
