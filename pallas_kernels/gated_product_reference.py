"""The first half of a gated feed-forward layer in plain jnp: the specification, and XLA's way."""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.split_product_reference import project
from jaxtyping import Array, Float

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def gate(gate_up: Float[Array, "T 2 F"], activation: str) -> Float[Array, "T F"]:
    """Return ``activation(gate) * up``."""
    return ACTIVATIONS[activation](gate_up[:, 0]) * gate_up[:, 1]


def gated_product_reference(
    x: Float[Array, "T D"], weight: Float[Array, "2 F D"], *, activation: str
) -> Float[Array, "T F"]:
    """As ``gated_product``. The product is rounded to x's dtype before the activation."""
    rows = weight.reshape(-1, weight.shape[2])
    gate_up = project(x, rows)
    return gate(jnp.reshape(gate_up, (x.shape[0], 2, weight.shape[1])), activation)
