"""Gated feed-forward layer."""

from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.layers.linear import Linear
from jaxengine.pallas_kernels.gated_product import ACTIVATIONS, gate, gated_product
from jaxengine.sharding import TENSOR_AXIS


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

    def parts(
        self, x: Float[Array, "T D"], *, implementation: str | None = None
    ) -> Float[Array, "S T D"]:
        """Serve some rows; return parts that are yet to be added up, over the shards too.

        Args:
            x: Rows.
            implementation: Of ``gated_product``.
        """
        return self.down_proj.parts(self._gated(x, implementation))

    def _gated(self, x: Float[Array, "T D"], implementation: str | None) -> Float[Array, "T F"]:
        projection = self.gate_up_proj
        if projection.input_major or projection.bias is not None:
            return gate(projection(x), self.hidden_act)
        return gated_product(
            x,
            projection.weight[...],
            activation=self.hidden_act,
            implementation=implementation,
        )
