"""Feed-forward layers, with a gate and without."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.convert.model_spec import FeedForwardSpec
from jaxengine.layers.linear import Linear
from jaxengine.pallas_kernels.gated_product import (
    ACTIVATIONS,
    activated_product,
    gate,
    gated_product,
)
from jaxengine.pallas_kernels.operands import Addends
from jaxengine.pallas_kernels.target import Target
from jaxengine.sharding import TENSOR_AXIS


class FeedForward(nnx.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    Gate and up are one weight, so one matrix product.

    Raises:
        ValueError: If the activation is not in ``ACTIVATIONS``.
    """

    num_sums = 1  # over the shards

    def __init__(
        self,
        hidden_size: int,
        spec: FeedForwardSpec,
        *,
        dtype: Any,
        target: Target,
        input_major: bool = False,
    ) -> None:
        if spec.activation not in ACTIVATIONS:
            raise ValueError(
                f"the activation {spec.activation!r} is not supported: use one of "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )
        self.activation = spec.activation
        self.target = target
        halves = (2,) if spec.is_gated else ()
        up = Linear(
            (*halves, spec.intermediate_size),
            (hidden_size,),
            spec=P(*(None,) * len(halves), TENSOR_AXIS, None),
            dtype=dtype,
            target=target,
            use_bias=spec.up_bias,
            input_major=input_major,
        )
        self.gate_up_proj = up if spec.is_gated else None
        self.up_proj = None if spec.is_gated else up
        self.down_proj = Linear(
            (hidden_size,),
            (spec.intermediate_size,),
            spec=P(None, TENSOR_AXIS),
            dtype=dtype,
            target=target,
            use_bias=spec.down_bias,
            input_major=input_major,
        )

    def addends(self, x: Float[Array, "T D"], *, implementation: str | None = None) -> Addends:
        """Serve some rows; return what is yet to be added up, over the shards too.

        Args:
            x: Rows.
            implementation: Of the first product; None for the fastest.
        """
        return self.down_proj.addends(self._activated(x, implementation))

    def _activated(self, x: Float[Array, "T D"], implementation: str | None) -> Array:
        projection = self.gate_up_proj or self.up_proj
        assert projection is not None
        bias = None if projection.bias is None else projection.bias[...]
        if projection.input_major:
            return self._activated_input_major(x, projection, bias)
        product = activated_product if self.gate_up_proj is None else gated_product
        return product(
            x,
            projection.weight[...],
            bias=bias,
            activation=self.activation,
            implementation=implementation,
            target=self.target,
        )

    def _activated_input_major(
        self, x: Float[Array, "T D"], projection: Linear, bias: Array | None
    ) -> Array:
        y = jnp.reshape(x @ projection.matrix, (x.shape[0], *projection.weight.shape[1:]))
        y = y if bias is None else y + bias
        return ACTIVATIONS[self.activation](y) if y.ndim == 2 else gate(y, self.activation)
