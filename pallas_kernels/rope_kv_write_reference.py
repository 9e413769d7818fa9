"""Head norms, rotary embedding and KV-cache write in plain jnp: the specification, and the CPU's.

XLA fuses it into the neighbouring products; where the caches are donated the writes are in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.residual_norm_reference import rms_norm, sum_parts
from jaxtyping import Array, Float, Int


class HeadNorm(NamedTuple):
    """Root-mean-square norms over the head dimension (Qwen 3).

    Attributes:
        q_weight: [H] for queries.
        k_weight: [H] for keys.
        eps: Added to the mean square.
    """

    q_weight: jax.Array
    k_weight: jax.Array
    eps: float


def rope_kv_write_reference(
    parts: Float[Array, "S T K G_plus_2 H"],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    *,
    norm: HeadNorm | None = None,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``rope_kv_write``."""
    qkv = sum_parts(parts, dtype)
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if norm is not None:
        q = rms_norm(q, norm.q_weight, norm.eps)
        k = rms_norm(k, norm.k_weight, norm.eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k_cache = _write(k_cache, k, slot_mapping)
    v_cache = _write(v_cache, v, slot_mapping)
    return q.reshape(q.shape[0], -1, q.shape[-1]), k_cache, v_cache


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first 2R dimensions of each head, halves paired as HF pairs them."""
    half = cos.shape[-1]
    cos = cos.reshape(cos.shape[0], *(1,) * (x.ndim - 2), half)
    sin = sin.reshape(cos.shape)
    x32 = x.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x[..., 2 * half :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def _write(cache: jax.Array, values: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    block_size = cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    return cache.at[blocks, :, offsets].set(values.astype(cache.dtype), mode="drop")
