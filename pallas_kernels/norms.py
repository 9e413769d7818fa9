"""Norms and sums in plain jnp: the specification, what XLA compiles, and pieces for the kernels."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxtyping import Array, Float


def normalise(x: Float[Array, "*rows D"], norm: Norm) -> Float[Array, "*rows D"]:
    """Normalise the last axis, computed in float32.

    Source: arXiv:1910.07467 ("rms"), arXiv:1607.06450 ("layer"); rounding as HF's models have it.

    Args:
        x: Rows.
        norm: With a weight and a bias that broadcast against the rows.
    """
    x32 = x.astype(jnp.float32)
    if norm.kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + norm.eps)
    return weighted(x32 * scale, norm, x.dtype)


def weighted(x32: jax.Array, norm: Norm, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Apply a norm's weight and bias to float32 rows of unit size, and round as its kind has it."""
    if norm.kind == "rms" and norm.offset == 0:
        x = x32.astype(dtype)
        x = x if norm.weight is None else x * norm.weight
        return (x if norm.bias is None else x + norm.bias).astype(dtype)
    if norm.weight is not None:
        weight = norm.weight.astype(jnp.float32)
        x32 = x32 * (weight if norm.offset == 0 else weight + norm.offset)
    return (x32 if norm.bias is None else x32 + norm.bias.astype(jnp.float32)).astype(dtype)


def add_up(arrays: Sequence[jax.Array]) -> jax.Array:
    """Sum of some arrays in float32."""
    return functools.reduce(jnp.add, [array.astype(jnp.float32) for array in arrays])


def sum_addends(
    addends: Addends, dtype: jax.typing.DTypeLike, *, with_bias: bool = True
) -> Float[Array, "T *shape"]:  # noqa: F821
    """Add up in float32, round once.

    Args:
        addends: Of this shard.
        dtype: Of the result.
        with_bias: Whether to add the bias, as one of several shards must not.
    """
    bias = addends.bias if with_bias else None
    if len(addends.arrays) == 1 and addends.arrays[0].shape[0] == 1 and bias is None:
        return addends.arrays[0][0].astype(dtype)
    sums = [array.astype(jnp.float32).sum(axis=0) for array in addends.arrays]
    if bias is not None:
        sums.append(bias.astype(jnp.float32))
    return add_up(sums).astype(dtype)


def joining(
    x: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    bias: jax.Array | None,
    inner: Callable[[jax.Array], jax.Array] | None,
    scale: float,
) -> jax.Array:
    """Make of a sum what joins the residual stream.

    Args:
        x: The sum over all shards; in float32 if it has not been rounded yet.
        dtype: Of the stream.
        bias: Added before the sum is rounded; None for none.
        inner: Norm of the sum before it joins the stream; None for none.
        scale: Factor on it, at last.
    """
    if bias is not None:
        x = x.astype(jnp.float32) + bias.astype(jnp.float32)
    x = x.astype(dtype)
    if inner is not None:
        x = inner(x)
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(dtype)
