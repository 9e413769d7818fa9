"""The split product in plain jnp: the specification, in a single part."""

import jax
from jaxtyping import Array, Float


def split_product_reference(
    x: Float[Array, "T I"], weight: Float[Array, "O I"]
) -> Float[Array, "1 T O"]:
    """As ``split_product``: accumulated in float32 by the matrix unit, rounded to x's dtype."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))[None]
