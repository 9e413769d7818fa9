"""A mixture of experts: each token goes through the few feed-forward layers that a router chooses.

Source: Shazeer et al., arXiv:1701.06538; routing without capacity limits as in arXiv:2211.15841.

Over several devices the experts are dealt out where their number divides (every device has the
activations, and its experts' rows are its part of the sum that a feed-forward layer leaves due
anyway); else each of them is cut, as a feed-forward layer is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxengine.convert.model_spec import ExpertsSpec
from jaxengine.layers.mlp import FeedForward
from jaxengine.layers.parameter import parameter
from jaxengine.layers.routing import Choice, choose_experts, sort_rows
from jaxengine.layers.routing_counts import report_routing
from jaxengine.pallas_kernels.gating import Gating
from jaxengine.pallas_kernels.grouped_product import grouped_gated_product, grouped_product
from jaxengine.pallas_kernels.operands import Addends
from jaxengine.pallas_kernels.residual_norm import sum_addends
from jaxengine.pallas_kernels.target import Target
from jaxengine.sharding import TENSOR_AXIS

# Rows of experts that are under way at once: a step of more is served in several goes, so that a
# long prefill needs no more memory.
MAX_ROWS = 1 << 16


class Experts(nnx.Module):
    """The experts of a layer, their router, and what every token goes through beside them.

    Args:
        hidden_size: D.
        spec: What is computed.
        dtype: Type of weights and activations.
        num_shards: Devices that share the experts.
        target: What the ops run on.
        input_major: How the shared layer's weights lie in memory, see ``Linear``.
    """

    num_sums = 1  # over the shards

    def __init__(
        self,
        hidden_size: int,
        spec: ExpertsSpec,
        *,
        dtype: Any,
        num_shards: int,
        target: Target,
        input_major: bool = False,
    ) -> None:
        self.spec, self.target = spec, target
        self.gating = Gating(spec.activation, spec.swiglu_limit, spec.swiglu_alpha)
        self.is_dealt = spec.num_experts % num_shards == 0
        E, F, D = spec.num_experts, spec.intermediate_size, hidden_size
        dealt, cut = (TENSOR_AXIS, None) if self.is_dealt else (None, TENSOR_AXIS)
        self.router = parameter((E, D), dtype, P(None, None))
        router = spec.router
        self.router_bias = parameter((E,), dtype, P(None)) if router.has_bias else None
        # In the type that it is stored in: differences between scores are smaller than bfloat16's.
        self.correction = (
            parameter((E,), jnp.float32, P(None), init="zeros") if router.has_correction else None
        )
        self.gate_up = parameter((E, 2, F, D), dtype, P(dealt, None, cut, None))
        self.down = parameter((E, D, F), dtype, P(dealt, None, cut))
        has_bias = spec.has_bias
        self.gate_up_bias = parameter((E, 2, F), dtype, P(dealt, None, cut)) if has_bias else None
        self.down_bias = parameter((E, D), dtype, P(dealt, None)) if has_bias else None
        self.shared = (
            None
            if spec.shared is None
            else FeedForward(
                hidden_size, spec.shared, dtype=dtype, target=target, input_major=input_major
            )
        )
        self.shared_gate = parameter((1, D), dtype, P(None, None)) if spec.has_shared_gate else None

    def addends(self, x: Float[Array, "T D"], *, is_real: Bool[Array, " T"]) -> Addends:
        """Serve some rows; return what is yet to be added up, over the shards too.

        Args:
            x: Rows.
            is_real: Which of them are no padding: that goes to no expert.
        """
        routed = Addends((self._routed(x, is_real)[None],))
        return routed if self.shared is None else routed + self._shared(self.shared, x)

    def _shared(self, shared: FeedForward, x: Float[Array, "T D"]) -> Addends:
        addends = shared.addends(x)
        if self.shared_gate is None:
            return addends
        gate = jax.nn.sigmoid(_project(x, self.shared_gate[...]))
        return Addends(((sum_addends(addends, jnp.float32) * gate)[None],))

    def _routed(self, x: Float[Array, "T D"], is_real: Bool[Array, " T"]) -> Float[Array, "T D"]:
        """What the experts of this shard give of each token, in float32."""
        choice = self._choose(x)
        num_goes = _num_goes(x.shape[0], self.spec.num_experts_per_token)
        if num_goes == 1:
            return self._serve(x, choice, is_real)

        def cut(array: Array) -> Array:
            return array.reshape(num_goes, -1, *array.shape[1:])

        parts = (cut(x), Choice(*map(cut, choice)), cut(is_real))
        return jax.lax.map(lambda part: self._serve(*part), parts).reshape(x.shape)

    def _choose(self, x: Float[Array, "T D"]) -> Choice:
        logits = _project(x, self.router[...])
        if self.router_bias is not None:
            logits = logits + self.router_bias[...].astype(jnp.float32)
        correction = None if self.correction is None else self.correction[...]
        spec = self.spec
        return choose_experts(logits, spec.router, spec.num_experts_per_token, correction)

    def _serve(
        self, x: Float[Array, "T D"], choice: Choice, is_real: Bool[Array, " T"]
    ) -> Float[Array, "T D"]:
        num_held = self.gate_up[...].shape[0]
        experts = choice.experts
        if self.is_dealt:
            experts = experts - jax.lax.axis_index(TENSOR_AXIS) * num_held
        is_served = is_real[:, None] & (experts >= 0) & (experts < num_held)
        rows = sort_rows(experts, is_served, num_held)
        report_routing(rows.group_sizes)
        weights = choice.weights.reshape(-1)[rows.pairs]
        tokens = rows.pairs // self.spec.num_experts_per_token
        hidden = self._gated(x, tokens, rows.group_sizes, weights)
        outputs = grouped_product(
            hidden,
            self.down[...],
            rows.group_sizes,
            bias=self._own_down_bias(),
            row_weights=None if self.spec.router.weighs_input else weights,
            target=self.target,
        )
        # Rows of no expert hold anything, so they are not multiplied by 0 but left out.
        own = jnp.where(is_served[:, :, None], outputs[rows.places].astype(jnp.float32), 0.0)
        return jnp.sum(own, axis=1)

    def _gated(self, x: Array, tokens: Array, group_sizes: Array, weights: Array) -> Array:
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        rows: Array | None = tokens
        if self.spec.router.weighs_input:
            x, rows = (x[tokens] * weights[:, None]).astype(x.dtype), None
        return grouped_gated_product(
            x,
            self.gate_up[...],
            group_sizes,
            rows=rows,
            bias=bias,
            gating=self.gating,
            target=self.target,
        )

    def _own_down_bias(self) -> Array | None:
        """The bias of the second product, which of cut experts only the first shard adds."""
        if self.down_bias is None:
            return None
        bias = self.down_bias[...]
        return bias if self.is_dealt else bias * (jax.lax.axis_index(TENSOR_AXIS) == 0)


def _project(x: Float[Array, "T D"], weight: Float[Array, "O D"]) -> Float[Array, "T O"]:
    """``x W^T`` in float32: of 16 bits each product is exact."""
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _num_goes(num_tokens: int, num_chosen: int) -> int:
    """In how many equal parts a step's tokens are served."""
    num_goes = 1
    while num_tokens * num_chosen > MAX_ROWS * num_goes and num_tokens % (2 * num_goes) == 0:
        num_goes *= 2
    return num_goes
