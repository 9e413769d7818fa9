"""How an expert's gate and up projection become one, for XLA and inside of kernels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.activations import ACTIVATIONS


@dataclass(frozen=True)
class Gating:
    """``activation(gate) * up``, or with a limit the clamped SwiGLU of gpt-oss.

    That is ``(up + 1) * gate * sigmoid(alpha * gate)``, with gate at most ``limit`` and up between
    ``-limit`` and ``limit``.

    Attributes:
        activation: A key of ``ACTIVATIONS``; without meaning where there is a limit.
        limit: None for the plain product.
        alpha: Of the clamped one.
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.702

    def __post_init__(self) -> None:
        """Refuse an activation that nobody computes.

        Raises:
            ValueError: Naming those that are.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"the activation {self.activation!r} is not supported: use one of "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )

    def __call__(
        self,
        gate: jax.Array,
        up: jax.Array,
        activations: Mapping[str, Callable[[jax.Array], jax.Array]] = ACTIVATIONS,
    ) -> jax.Array:
        """Return the gated product; ``activations`` are a kernel's own."""
        if self.limit is None:
            return activations[self.activation](gate) * up
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1.0) * gate * jax.nn.sigmoid(self.alpha * gate)
