"""The first half of a feed-forward layer in plain jnp: the specification, and XLA's way."""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.split_product_reference import project
from jaxtyping import Array, Float


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


# By Hugging Face's names, several of which mean the same.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


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
    """As ``gated_product``. The product is rounded to x's dtype before bias and activation."""
    rows = weight.reshape(-1, weight.shape[2])
    gate_up = jnp.reshape(project(x, rows), (x.shape[0], 2, weight.shape[1]))
    return gate(gate_up if bias is None else gate_up + bias, activation)


def activated_product_reference(
    x: Float[Array, "T D"],
    weight: Float[Array, "F D"],
    bias: Float[Array, " F"] | None = None,
    *,
    activation: str,
) -> Float[Array, "T F"]:
    """As ``activated_product``. The product is rounded to x's dtype before bias and activation."""
    product = project(x, weight)
    return ACTIVATIONS[activation](product if bias is None else product + bias)
