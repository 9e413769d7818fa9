"""Products of groups of rows as loops of XLA's: the way on a CPU, and where no kernel serves.

A step of the loop multiplies a tile of rows with the weight of their group. Measured on two cores
(32 experts of [768, 1024] in float32, milliseconds): ::

    rows             4      16     128    2048
    a row a step    0.43    3.2    17.5    178
    64 a step               15.8    118     95
    ragged_dot       307    407     512   8300

So rows go one by one until there are many for each group. A row alone takes XLA's loop that reads
a weight as it lies, [out, in]; two rows already take a matrix product that wants it otherwise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxengine.pallas_kernels.gating import Gating
from jaxengine.pallas_kernels.grouped_tiles import build_grouped_tiles
from jaxtyping import Array, Float, Int

TILE_ROWS = 64
MANY_ROWS = 32  # of a group, on average

# From the product of a tile [tile, out] in float32, its group and its first row, to what is stored.
Finish = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def grouped_product_xla(
    x: Float[Array, "R I"],
    weight: Float[Array, "E O I"],
    group_sizes: Int[Array, " E"],
    bias: Float[Array, "E O"] | None = None,
    row_weights: Float[Array, " R"] | None = None,
) -> Float[Array, "R O"]:
    """As ``grouped_product``."""
    tile = _tile_rows(x.shape[0], weight.shape[0])
    factors = None if row_weights is None else jnp.pad(row_weights, (0, tile))

    def finish(product: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
        if bias is not None:
            product = product + bias[group].astype(jnp.float32)
        if factors is None:
            return product
        return product * lax.dynamic_slice_in_dim(factors, start, tile)[:, None]

    return _loop(x, None, weight, group_sizes, tile, weight.shape[1], finish)


def grouped_gated_product_xla(
    x: Float[Array, "T D"],
    weight: Float[Array, "E 2 F D"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " R"] | None = None,
    bias: Float[Array, "E 2 F"] | None = None,
    *,
    gating: Gating,
) -> Float[Array, "R F"]:
    """As ``grouped_gated_product``."""
    E, _, F, _ = weight.shape
    num_rows = (x if rows is None else rows).shape[0]

    def finish(product: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
        del start
        both = product.reshape(-1, 2, F)
        if bias is not None:
            both = both + bias[group].astype(jnp.float32)
        return gating(both[:, 0], both[:, 1])

    tile = _tile_rows(num_rows, E)
    return _loop(x, rows, weight, group_sizes, tile, F, finish)


def _tile_rows(num_rows: int, num_groups: int) -> int:
    return TILE_ROWS if num_rows >= MANY_ROWS * num_groups else 1


def _own(weight: Float[Array, "E *out I"], group: jax.Array) -> Float[Array, "*out I"]:
    """The weight of one group in float32.

    The barrier keeps XLA from making the weights of all groups float32 before the loop.
    """
    weight, group = lax.optimization_barrier((weight, group))
    return lax.dynamic_index_in_dim(weight, group, keepdims=False).astype(jnp.float32)


def _loop(
    x: jax.Array,
    rows: jax.Array | None,
    weight: Float[Array, "E *out I"],
    group_sizes: jax.Array,
    tile: int,
    num_out: int,
    finish: Finish,
) -> jax.Array:
    """Serve the tiles in their order.

    A tile may reach past its group; what it stores there, the next tile overwrites.
    """
    num_rows = (x if rows is None else rows).shape[0]
    tiles = build_grouped_tiles(group_sizes, num_rows, tile)
    padded = jnp.pad(x, ((0, tile), (0, 0))) if rows is None else x
    sources = None if rows is None else jnp.pad(rows, (0, tile))

    def step(number: jax.Array, out: jax.Array) -> jax.Array:
        group, start = tiles.group[number], tiles.start[number]
        if sources is None:
            read = lax.dynamic_slice_in_dim(padded, start, tile)
        else:
            read = padded[lax.dynamic_slice_in_dim(sources, start, tile)]
        product = read.astype(jnp.float32) @ _own(weight, group).reshape(-1, x.shape[1]).T
        stored = finish(product, group, start).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, stored, start, 0)

    out = jnp.zeros((num_rows + tile, num_out), x.dtype)
    return lax.fori_loop(0, tiles.total, step, out)[:num_rows]
