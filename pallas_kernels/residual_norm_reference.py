"""Sum of a product's parts, residual added, normalised, in plain jnp: the specification."""

import functools

import jax
from jaxengine.pallas_kernels.norms import joining, normalise, sum_addends
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxtyping import Array, Float


def residual_norm_reference(
    addends: Addends,
    residual: Float[Array, "T D"],
    norms: tuple[Norm, ...] = (),
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
    axis_name: str,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """As ``residual_norm``."""
    is_alone = jax.lax.axis_size(axis_name) == 1  # then the sum is rounded with its bias
    own = sum_addends(addends, residual.dtype, with_bias=is_alone)
    x = joining(
        jax.lax.psum(own, axis_name),
        residual.dtype,
        bias=None if is_alone else addends.bias,
        inner=None if inner is None else functools.partial(normalise, norm=inner),
        scale=scale,
    )
    total = residual + x
    return total, tuple(normalise(total, norm) for norm in norms)
