"""Products of groups of rows in plain jnp: the specification.

Every group is multiplied with all rows: it costs as many times what it should as there are groups,
and is here to be compared with and to be differentiated.
"""

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.gating import Gating
from jaxtyping import Array, Float, Int


def grouped_product_reference(
    x: Float[Array, "R I"],
    weight: Float[Array, "E O I"],
    group_sizes: Int[Array, " E"],
    bias: Float[Array, "E O"] | None = None,
    row_weights: Float[Array, " R"] | None = None,
) -> Float[Array, "R O"]:
    """As ``grouped_product``, in float32 until the last; rows of no group are zeros."""
    product = _ragged(x, weight, group_sizes)
    if bias is not None:
        product = product + _of_groups(bias, group_sizes, x.shape[0])
    if row_weights is not None:
        product = product * row_weights[:, None]
    return product.astype(x.dtype)


def grouped_gated_product_reference(
    x: Float[Array, "T D"],
    weight: Float[Array, "E 2 F D"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " R"] | None = None,
    bias: Float[Array, "E 2 F"] | None = None,
    *,
    gating: Gating,
) -> Float[Array, "R F"]:
    """As ``grouped_gated_product``, in float32 until the last; rows of no group are zeros."""
    E, _, F, D = weight.shape
    read = x if rows is None else x[rows]
    product = _ragged(read, weight.reshape(E, 2 * F, D), group_sizes).reshape(-1, 2, F)
    if bias is not None:
        product = product + _of_groups(bias, group_sizes, read.shape[0])
    return gating(product[:, 0], product[:, 1]).astype(x.dtype)


def _ragged(
    x: Float[Array, "R I"], weight: Float[Array, "E O I"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R O"]:
    """One group after the other, over all rows: jax's ragged_dot knows no vmap."""
    group = _group_of_rows(group_sizes, x.shape[0])

    def add_group(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        number, matrix = inputs
        product = jax.lax.dot_general(
            x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jnp.where((group == number)[:, None], product, total), None

    nothing = jnp.zeros((x.shape[0], weight.shape[1]), jnp.float32)
    total, _ = jax.lax.scan(add_group, nothing, (jnp.arange(weight.shape[0]), weight))
    return total


def _group_of_rows(group_sizes: Int[Array, " E"], num_rows: int) -> Int[Array, " R"]:
    """The group of each row; E for rows of no group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def _of_groups(bias: Array, group_sizes: Int[Array, " E"], num_rows: int) -> Array:
    """Each row's own bias [R, ...] of those of the groups [E, ...]; 0 for rows of no group."""
    group = _group_of_rows(group_sizes, num_rows)
    return jnp.take(bias.astype(jnp.float32), group, axis=0, mode="fill", fill_value=0.0)
