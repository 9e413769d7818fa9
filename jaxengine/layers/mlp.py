"""Gated feed-forward layer."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.layers.linear import Linear
from jaxengine.sharding import TENSOR_AXIS

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``; gate and up are one weight, so one matrix product.

    Raises:
        ValueError: If the activation is not in ``ACTIVATIONS``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str,
        use_bias: bool,
        dtype: Any,
        input_major: bool = False,
    ) -> None:
        if hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {hidden_act!r} is not supported: use one of {sorted(ACTIVATIONS)}"
            )
        self.hidden_act = hidden_act
        self.gate_up_proj = Linear(
            (2, intermediate_size),
            (hidden_size,),
            spec=P(None, TENSOR_AXIS, None),
            dtype=dtype,
            use_bias=use_bias,
            input_major=input_major,
        )
        self.down_proj = Linear(
            (hidden_size,),
            (intermediate_size,),
            spec=P(None, TENSOR_AXIS),
            dtype=dtype,
            use_bias=use_bias,
            input_major=input_major,
        )

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate_up = self.gate_up_proj(x)  # [T, 2, F]
        activation = ACTIVATIONS[self.hidden_act]
        return self.down_proj(activation(gate_up[:, 0]) * gate_up[:, 1])
