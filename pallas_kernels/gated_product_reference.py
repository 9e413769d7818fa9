"""The first half of a feed-forward layer in plain jnp: the specification, and XLA's way."""

import jax
from jaxengine.pallas_kernels.activations import ACTIVATIONS
from jaxengine.pallas_kernels.split_product_reference import project
from jaxtyping import Array, Float


def gate(gate_up: Float[Array, "T 2 F"], activation: str) -> Float[Array, "T F"]:
    """Return ``activation(gate) * up``."""
    return ACTIVATIONS[activation](gate_up[:, 0]) * gate_up[:, 1]


def gated_product_reference(
    x: Float[Array, "T D"],
    weight: Float[Array, "2 F D"],
    bias: Float[Array, "2 F"] | None = None,
    *,
    activation: str,
) -> Float[Array, "T F"]:
    """As ``gated_product``. The product is rounded to x's dtype before the activation."""
    rows = weight.reshape(-1, weight.shape[2])
    gate_up = project(x, rows).reshape(x.shape[0], 2, weight.shape[1])
    return gate(gate_up if bias is None else gate_up + bias, activation)


def activated_product_reference(
    x: Float[Array, "T D"],
    weight: Float[Array, "F D"],
    bias: Float[Array, " F"] | None = None,
    *,
    activation: str,
) -> Float[Array, "T F"]:
    """As ``activated_product``. The product is rounded to x's dtype before the activation."""
    product: jax.Array = project(x, weight)
    return ACTIVATIONS[activation](product if bias is None else product + bias)
