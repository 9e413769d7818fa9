"""Cuts groups of rows into tiles that each lie in one group."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class GroupedTiles(NamedTuple):
    """Tiles of rows; those past the last have group E.

    Attributes:
        group: Whose rows they are.
        start: First row.
        end: Where the group's rows end; a tile takes fewer than its length there.
        total: How many tiles there are.
    """

    group: Int[Array, " M"]
    start: Int[Array, " M"]
    end: Int[Array, " M"]
    total: Int[Array, ""]


def max_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """M: as many tiles as any sizes of groups can need."""
    return min(num_rows, num_rows // tile_rows + min(num_groups, num_rows))


def build_grouped_tiles(
    group_sizes: Int[Array, " E"], num_rows: int, tile_rows: int
) -> GroupedTiles:
    """Return the tiles, those of group 0 first.

    Args:
        group_sizes: Rows of each group.
        num_rows: R, of all groups at most.
        tile_rows: Rows of a tile.
    """
    num_groups = group_sizes.shape[0]
    tiles = -(-group_sizes // tile_rows)
    tile_ends, row_ends = jnp.cumsum(tiles), jnp.cumsum(group_sizes)
    number = jnp.arange(max_tiles(num_rows, num_groups, tile_rows), dtype=jnp.int32)
    group = jnp.sum(tile_ends[None, :] <= number[:, None], axis=1, dtype=jnp.int32)
    own = jnp.minimum(group, num_groups - 1)
    first_tile, first_row = tile_ends - tiles, row_ends - group_sizes
    start = first_row[own] + (number - first_tile[own]) * tile_rows
    return GroupedTiles(group, start.astype(jnp.int32), row_ends[own], tile_ends[-1])
