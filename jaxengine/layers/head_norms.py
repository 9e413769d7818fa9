"""Norms of queries and keys that no kernel does.

Over all heads of a token together (OLMo 2), over the shards too; or behind the rotation (HunYuan).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.layers.rope import rotate
from jaxengine.pallas_kernels.operands import Norm
from jaxengine.pallas_kernels.residual_norm import normalise
from jaxengine.sharding import TENSOR_AXIS


def normalise_over_heads(
    qkv: Float[Array, "T K G_plus_2 H"], q_norm: Norm, k_norm: Norm
) -> Float[Array, "T K G_plus_2 H"]:
    """Normalise all queries of a token as one vector, and all its keys as another.

    Args:
        qkv: This shard's heads.
        q_norm: RMS norm with this shard's part of the weight, [N * H].
        k_norm: Likewise, [K * H].
    """
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1:]
    return jnp.concatenate([_normalised(q, q_norm), _normalised(k, k_norm), v], axis=2)


def _normalised(x: Float[Array, "T K G H"], norm: Norm) -> Float[Array, "T K G H"]:
    assert norm.kind == "rms", "layer norms over all heads have no family"
    x32 = x.astype(jnp.float32)
    squares = jax.lax.psum(jnp.sum(jnp.square(x32), axis=(1, 2, 3), keepdims=True), TENSOR_AXIS)
    count = x[0].size * jax.lax.axis_size(TENSOR_AXIS)
    normed = x32 * jax.lax.rsqrt(squares / count + norm.eps)
    if norm.weight is None:
        return normed.astype(x.dtype)
    return normed.astype(x.dtype) * norm.weight.reshape(x.shape[1:])


def normalise_rotated_heads(
    qkv: Float[Array, "T K G_plus_2 H"],
    cos_sin: tuple[Float[Array, "T R"], Float[Array, "T R"]] | None,
    q_norm: Norm,
    k_norm: Norm,
) -> Float[Array, "T K G_plus_2 H"]:
    """Rotate queries and keys, then normalise each head of them.

    Args:
        qkv: This shard's heads.
        cos_sin: Of the tokens' angles; None for no rotation.
        q_norm: Of a query head, [H].
        k_norm: Of a key head, [H].
    """
    qk, v = qkv[:, :, :-1], qkv[:, :, -1:]
    if cos_sin is not None:
        qk = rotate(qk, cos_sin)
    q, k = normalise(qk[:, :, :-1], q_norm), normalise(qk[:, :, -1:], k_norm)
    return jnp.concatenate([q, k, v], axis=2)
