"""Grouped-query attention over the paged KV cache.

Keys and values of the step are written first; attention then reads only the cache. So chunked
prefill, prefix caching and decode are one case.
"""

import dataclasses
import math
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.batch import InputBatch
from jaxengine.layers.linear import Linear
from jaxengine.layers.norm import RMSNorm
from jaxengine.pallas_kernels.paged_attention import paged_attention
from jaxengine.pallas_kernels.rope_kv_write import HeadNorm, rope_kv_write
from jaxengine.sharding import TENSOR_AXIS


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What differs between families.

    Attributes:
        sliding_window: Tokens that a query sees, its own included; None for all.
        implementation: Kernel to use; None for the best one.
        input_major: How weights lie in memory, see ``Linear``.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    implementation: str | None = None
    input_major: bool = False


class Attention(nnx.Module):
    """Attention with one fused weight for queries, keys and values.

    The fused weight is grouped by KV head, [K, G + 2, H, D] with the G query heads of the group,
    then its key and its value: cutting axis K gives every shard whole groups.

    It returns an output for each token, or with ``batch.last_tokens_only`` for each row [B, D]: the
    parts of it that are yet to be added up, over the shards too.
    """

    def __init__(self, spec: AttentionSpec, *, dtype: Any) -> None:
        self.spec = spec
        group = spec.num_heads // spec.num_kv_heads
        self.qkv_proj = Linear(
            (spec.num_kv_heads, group + 2, spec.head_dim),
            (spec.hidden_size,),
            spec=P(TENSOR_AXIS, None, None, None),
            dtype=dtype,
            use_bias=spec.qkv_bias,
            input_major=spec.input_major,
        )
        self.o_proj = Linear(
            (spec.hidden_size,),
            (spec.num_heads, spec.head_dim),
            spec=P(None, TENSOR_AXIS, None),
            dtype=dtype,
            use_bias=spec.out_bias,
            input_major=spec.input_major,
        )
        eps = spec.qk_norm_eps
        self.q_norm = None if eps is None else RMSNorm(spec.head_dim, eps=eps, dtype=dtype)
        self.k_norm = None if eps is None else RMSNorm(spec.head_dim, eps=eps, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "T D"],
        batch: InputBatch,
        cos_sin: tuple[Float[Array, "T R"], Float[Array, "T R"]],
        k_cache: Float[Array, "num_blocks K block_size H"],
        v_cache: Float[Array, "num_blocks K block_size H"],
    ) -> tuple[
        Float[Array, "S outputs D"],
        Float[Array, "num_blocks K block_size H"],
        Float[Array, "num_blocks K block_size H"],
    ]:
        q, k_cache, v_cache = rope_kv_write(
            self.qkv_proj.parts(x),  # [S, T, K, G + 2, H]
            *cos_sin,
            batch.slot_mapping,
            k_cache,
            v_cache,
            norm=self._head_norm(),
            dtype=x.dtype,
        )
        if batch.last_tokens_only:
            # A row's last token sees all of its keys, as a decode row does.
            q = q[batch.logits_indices]
        attended = paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.seq_lens,
            batch.query_start_loc,
            batch.num_decode_rows,
            scale=1 / math.sqrt(self.spec.head_dim),
            sliding_window=self.spec.sliding_window,
            logits_soft_cap=self.spec.logits_soft_cap,
            decode_only=batch.decode_only or batch.last_tokens_only,
            implementation=self.spec.implementation,
        )
        return self.o_proj.parts(attended), k_cache, v_cache

    def _head_norm(self) -> HeadNorm | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorm(self.q_norm.weight[...], self.k_norm.weight[...], self.q_norm.eps)
