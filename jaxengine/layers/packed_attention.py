"""Attention without a cache: each token sees all tokens of its own sequence."""

import functools
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.convert.model_spec import AttentionSpec
from jaxengine.layers.linear import Linear
from jaxengine.pallas_kernels.operands import Addends, AttentionOptions
from jaxengine.pallas_kernels.packed_attention import packed_attention
from jaxengine.pallas_kernels.residual_norm import sum_addends
from jaxengine.pallas_kernels.target import Target


class PackedAttention(nnx.Module):
    """Attention of an encoder, with the parameters of ``Attention``.

    Args:
        hidden_size: D.
        spec: What is computed; without rotation and head norms.
        dtype: Type of weights and activations.
        target: What the ops run on.
        implementation: Of ``packed_attention``; None for the fastest.
        input_major: How weights lie in memory, see ``Linear``.
    """

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        dtype: Any,
        target: Target,
        implementation: str | None = None,
        input_major: bool = False,
    ) -> None:
        self.spec, self.target, self.implementation = spec, target, implementation
        N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
        linear = functools.partial(Linear, dtype=dtype, target=target, input_major=input_major)
        whole = P(None, None, None, None)
        self.qkv_proj = linear(
            (K, N // K + 2, H), (hidden_size,), spec=whole, use_bias=spec.qkv_bias
        )
        self.o_proj = linear(
            (hidden_size,), (N, H), spec=P(None, None, None), use_bias=spec.out_bias
        )

    def __call__(self, x: Float[Array, "T D"], query_start_loc: Int[Array, " B_plus_1"]) -> Addends:
        """Attend; return what is yet to be added up.

        Args:
            x: Rows of all tokens.
            query_start_loc: First token of each sequence, and the end of the last.
        """
        spec, num_tokens = self.spec, x.shape[0]
        qkv = sum_addends(self.qkv_proj.addends(x), x.dtype)  # [T, K, G + 2, H]
        attended = packed_attention(
            qkv[:, :, :-2].reshape(num_tokens, spec.num_heads, spec.head_dim),
            qkv[:, :, -2],
            qkv[:, :, -1],
            query_start_loc,
            options=AttentionOptions(spec.scale, spec.sliding_window, spec.logits_soft_cap),
            target=self.target,
            implementation=self.implementation,
        )
        return self.o_proj.addends(attended)
