"""Grouped-query attention over the paged KV cache.

Keys and values of the step are written first; attention then reads only the cache. So chunked
prefill, prefix caching and decode are one case.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.batch import InputBatch
from jaxengine.convert.model_spec import AttentionSpec
from jaxengine.layers.dense_attention import dense_attention
from jaxengine.layers.head_norms import normalise_over_heads, normalise_rotated_heads
from jaxengine.layers.linear import Linear
from jaxengine.layers.norm import Norm
from jaxengine.layers.parameter import parameter
from jaxengine.pallas_kernels.operands import Addends, AttentionOptions
from jaxengine.pallas_kernels.operands import Norm as NormOperand
from jaxengine.pallas_kernels.paged_attention import paged_attention
from jaxengine.pallas_kernels.residual_norm import sum_addends
from jaxengine.pallas_kernels.rope_kv_write import rope_kv_write
from jaxengine.pallas_kernels.target import Target
from jaxengine.sharding import TENSOR_AXIS, held_kv_heads
from jaxengine.taps import Taps, tap

CosSin = tuple[Float[Array, "T R"], Float[Array, "T R"]]
KVPair = tuple[Array, Array]


class Attention(nnx.Module):
    """Attention with one fused weight for queries, keys and values.

    The fused weight is grouped by KV head, [K, G + 2, H, D] with the G query heads of the group,
    then its key and its value: cutting axis K gives every shard whole groups. With more shards
    than KV heads each is held several times, with its share of the queries.

    It returns an output for each token, or with ``batch.last_tokens_only`` for each row [B, D]:
    what is yet to be added up, over the shards too.

    Args:
        hidden_size: D.
        spec: What is computed.
        dtype: Type of weights and activations.
        num_shards: Devices that share the heads.
        target: What the ops run on.
        implementation: Of ``paged_attention``; None for the fastest.
        input_major: How weights lie in memory, see ``Linear``.
    """

    num_sums = 1  # over the shards

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        dtype: Any,
        num_shards: int,
        target: Target,
        implementation: str | None = None,
        input_major: bool = False,
    ) -> None:
        self.spec, self.target, self.implementation = spec, target, implementation
        K = held_kv_heads(spec.num_kv_heads, num_shards)
        N, H = spec.num_heads, spec.head_dim
        linear = functools.partial(Linear, dtype=dtype, target=target, input_major=input_major)
        self.qkv_proj = linear(
            (K, N // K + 2, H),
            (hidden_size,),
            spec=P(TENSOR_AXIS, None, None, None),
            use_bias=spec.qkv_bias,
            num_kv_heads=spec.num_kv_heads,
        )
        self.o_proj = linear(
            (hidden_size,),
            (N, H),
            spec=P(None, TENSOR_AXIS, None),
            use_bias=spec.out_bias,
        )
        self.sinks = parameter((N,), dtype, P(TENSOR_AXIS)) if spec.has_sinks else None
        self.q_norm = self._new_head_norm(N, dtype)
        self.k_norm = self._new_head_norm(spec.num_kv_heads, dtype)

    def _new_head_norm(self, num_heads: int, dtype: Any) -> Norm | None:
        if (head_norm := self.spec.head_norm) is None:
            return None
        H = self.spec.head_dim
        shape, cut = {
            "head": ((H,), P(None)),
            "heads": ((num_heads, H), P(TENSOR_AXIS, None)),
            "all": ((num_heads * H,), P(TENSOR_AXIS)),
        }[head_norm.scope]
        return Norm(shape, head_norm.norm, dtype=dtype, cut=cut)

    def __call__(
        self,
        x: Float[Array, "T D"],
        batch: InputBatch,
        cos_sin: CosSin | None,
        caches: KVPair,
        taps: Taps | None = None,
    ) -> tuple[Addends, KVPair]:
        qkv, cos_sin = self._qkv(x, cos_sin)
        q, k_cache, v_cache = rope_kv_write(
            qkv,
            cos_sin,
            batch.slot_mapping,
            *caches,
            q_norm=self._head_norm(self.q_norm),
            k_norm=self._head_norm(self.k_norm),
            dtype=x.dtype,
            target=self.target,
        )
        if batch.last_tokens_only:
            # A row's last token sees all of its keys, as a decode row does.
            q = q[batch.logits_indices]
        if batch.segment_ids is not None:
            attended = self._attend_among(q, k_cache[:, :, 0], v_cache[:, :, 0], batch, taps)
            return self.o_proj.addends(attended), (k_cache, v_cache)
        attended = paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.seq_lens,
            batch.query_start_loc,
            batch.num_decode_rows,
            options=self._options,
            alibi_slopes=self._slopes(q.shape[1]),
            sinks=None if self.sinks is None else self.sinks[...],
            decode_only=batch.decode_only or batch.last_tokens_only,
            implementation=self.implementation,
            target=self.target,
        )
        return self.o_proj.addends(attended), (k_cache, v_cache)

    @property
    def _options(self) -> AttentionOptions:
        spec = self.spec
        return AttentionOptions(spec.scale, spec.sliding_window, spec.logits_soft_cap)

    def _attend_among(
        self, q: Array, k: Array, v: Array, batch: InputBatch, taps: Taps | None
    ) -> Float[Array, "T N H"]:
        """Attention of the step's tokens among themselves, by their segments."""
        assert batch.segment_ids is not None
        attended = dense_attention(
            tap(taps, "q", q),
            tap(taps, "k", k),
            tap(taps, "v", v),
            batch.positions,
            batch.segment_ids,
            self._slopes(q.shape[1]),
            None if self.sinks is None else self.sinks[...],
            options=self._options,
            taps=taps,
        )
        return tap(taps, "heads", attended)

    def _qkv(self, x: Float[Array, "T D"], cos_sin: CosSin | None) -> tuple[Addends, CosSin | None]:
        """Queries, keys and values [S, T, K, G + 2, H], and the rotation that is yet to be done.

        What no kernel does to them is done.
        """
        clip, addends = self.spec.qkv_clip, self.qkv_proj.addends(x)
        if clip is None and not self._has_norms_of_its_own:
            return addends, cos_sin
        qkv = sum_addends(addends, x.dtype)
        if self._has_norms_of_its_own:
            assert self.spec.head_norm is not None
            assert self.q_norm is not None
            assert self.k_norm is not None
            norms = self.q_norm.operand, self.k_norm.operand
            if self.spec.head_norm.scope == "all":
                qkv = normalise_over_heads(qkv, *norms)
            else:
                qkv, cos_sin = normalise_rotated_heads(qkv, cos_sin, *norms), None
        if clip is not None:
            qkv = jnp.clip(qkv, -clip, clip)
        return Addends((qkv[None],), None), cos_sin

    @property
    def _has_norms_of_its_own(self) -> bool:
        """Whether heads have norms that ``rope_kv_write`` does not do."""
        head_norm = self.spec.head_norm
        return head_norm is not None and (head_norm.scope == "all" or head_norm.follows_rope)

    def _head_norm(self, norm: Norm | None) -> NormOperand | None:
        return None if norm is None or self._has_norms_of_its_own else norm.operand

    def _slopes(self, num_heads: int) -> Float[Array, " N"] | None:
        """This shard's slopes."""
        if self.spec.alibi_slopes is None:
            return None
        slopes = jnp.asarray(self.spec.alibi_slopes, jnp.float32)
        first = jax.lax.axis_index(TENSOR_AXIS) * num_heads
        return jax.lax.dynamic_slice_in_dim(slopes, first, num_heads)
