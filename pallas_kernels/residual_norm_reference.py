"""Sum of what is due, residual added, normalised, in plain jnp: the specification."""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxtyping import Array, Float


def sum_parts(
    parts: Float[Array, "S *shape"],  # noqa: F821
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*shape"]:
    """Add up in float32, round once."""
    if parts.shape[0] == 1:
        return parts[0].astype(dtype)
    return parts.astype(jnp.float32).sum(axis=0).astype(dtype)


def sum_addends(addends: Addends, dtype: jax.typing.DTypeLike) -> Array:
    """Add up in float32, the bias included, round once: [T, ...], this shard's alone."""
    if addends.is_single:
        return sum_parts(addends.arrays[0], dtype)
    total = sum(array.astype(jnp.float32).sum(axis=0) for array in addends.arrays)
    if addends.bias is not None:
        total = total + addends.bias.astype(jnp.float32)
    return jnp.asarray(total).astype(dtype)


def normalise(x: Float[Array, "*rows D"], norm: Norm) -> Float[Array, "*rows D"]:
    """Return a norm over the last axis; see ``Norm`` for the equations and their rounding."""
    x32 = x.astype(jnp.float32)
    if norm.kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + norm.eps)
    if norm.kind == "rms" and norm.offset == 0 and norm.bias is None:
        normed = normed.astype(x.dtype)
        return normed if norm.weight is None else normed * norm.weight
    if norm.weight is not None:
        normed = normed * (norm.offset + norm.weight.astype(jnp.float32))
    if norm.bias is not None:
        normed = normed + norm.bias.astype(jnp.float32)
    return normed.astype(x.dtype)


def scaled(x: Float[Array, "T D"], scale: float) -> Float[Array, "T D"]:
    """Multiply in x's dtype, by a factor rounded to it; nothing for 1."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def residual_norm_reference(
    addends: Addends,
    residual: Float[Array, "T D"],
    norms: tuple[Norm, ...],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    axis_name: str,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """As ``residual_norm``."""
    total = residual + due_sum(addends, residual.dtype, inner, scale, axis_name)
    return total, tuple(normalise(total, norm) for norm in norms)


def due_sum(
    addends: Addends,
    dtype: jax.typing.DTypeLike,
    inner: Norm | None,
    scale: float,
    axis_name: str,
) -> Float[Array, "T D"]:
    """What is added to the stream: the sum over parts and shards, normalised and scaled."""
    if jax.lax.axis_size(axis_name) == 1:
        total = jax.lax.psum(sum_addends(addends, dtype), axis_name)
    else:  # each shard's part is rounded before it is sent
        total = jax.lax.psum(sum_addends(Addends(addends.arrays), dtype), axis_name)
        total = with_bias(total, addends.bias)
    return scaled(total if inner is None else normalise(total, inner), scale)


def with_bias(x: Float[Array, "T D"], bias: Float[Array, " D"] | None) -> Float[Array, "T D"]:
    """Add a bias in float32, round once."""
    if bias is None:
        return x
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
