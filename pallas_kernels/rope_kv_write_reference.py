"""Head norms, rotary embedding and KV-cache write in plain jnp: the specification, and the CPU's.

XLA fuses it into the neighbouring products; where the caches are donated the writes are in place.
"""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.norms import normalise, sum_addends
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxtyping import Array, Float, Int

CosSin = tuple[Float[Array, "T R"], Float[Array, "T R"]]


def rope_kv_write_reference(
    addends: Addends,
    cos_sin: CosSin | None,
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``rope_kv_write``."""
    qkv = sum_addends(addends, dtype)
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    q = q.reshape(q.shape[0], -1, q.shape[-1])
    if q_norm is not None:
        q = normalise(q, q_norm)
    if k_norm is not None:
        k = normalise(k, k_norm)
    if cos_sin is not None:
        q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
    k_cache = _write(k_cache, k, slot_mapping)
    v_cache = _write(v_cache, v, slot_mapping)
    return q, k_cache, v_cache


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
