import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.pallas_kernels.ragged_tiles import (
    RaggedTiles,
    build_ragged_tiles,
    key_tiles,
    max_num_tiles,
)


def build(
    query_lens: list[int],
    seq_lens: list[int],
    num_decode_rows: int,
    num_tokens: int,
    alignment: int = 1,
) -> RaggedTiles:
    return build_ragged_tiles(
        jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32),
        jnp.asarray(seq_lens, jnp.int32),
        jnp.asarray(num_decode_rows, jnp.int32),
        num_tokens=num_tokens,
        tile_q=4,
        alignment=alignment,
    )


def used(tiles: RaggedTiles) -> list[tuple[int, ...]]:
    """Return the used tiles as (row, token, start, num_tokens, position)."""
    columns = [np.asarray(column)[: int(tiles.num_tiles[0])].tolist() for column in tiles[:5]]
    return list(zip(*columns, strict=True))


def test_the_tiles_of_a_row_come_longest_context_first() -> None:
    tiles = build([10], [10], 0, num_tokens=10)
    assert used(tiles) == [(0, 8, 0, 2, 8), (0, 4, 0, 4, 4), (0, 0, 0, 4, 0)]


def test_rows_are_ordered_by_context_and_offset_by_their_cached_prefix() -> None:
    tiles = build([3, 5], [3, 105], 0, num_tokens=8)
    assert used(tiles) == [(1, 7, 0, 1, 104), (1, 3, 0, 4, 100), (0, 0, 0, 3, 0)]


def test_aligned_tiles_begin_before_a_row_that_does_not() -> None:
    tiles = build([3, 5], [3, 105], 0, num_tokens=8, alignment=2)
    assert used(tiles) == [(1, 6, 0, 2, 103), (1, 2, 1, 4, 99), (0, 0, 0, 3, 0)]


def test_decode_rows_and_padding_tokens_get_tiles_without_keys() -> None:
    tiles = used(build([1, 1, 4], [9, 9, 4], 2, num_tokens=11))
    assert [tile for tile in tiles if tile[4] + tile[3] > 0] == [(2, 2, 0, 4, 0)]
    fillers = [(token, count) for _, token, _, count, position in tiles if position + count <= 0]
    assert sorted(fillers) == [(0, 2), (6, 4), (10, 1)]


@pytest.mark.parametrize("alignment", [1, 2, 4])
def test_tiles_cover_every_token_once_and_fit_the_static_length(alignment: int) -> None:
    rng = np.random.default_rng(0)
    for num_rows, padding in ((1, 0), (3, 5), (6, 1)):
        query_lens = rng.integers(1, 12, size=num_rows).tolist()
        num_tokens = sum(query_lens) + padding
        tiles = build(query_lens, query_lens, 0, num_tokens, alignment)
        covered = [
            token + i for _, token, start, count, _ in used(tiles) for i in range(start, count)
        ]
        assert sorted(covered) == list(range(num_tokens))
        assert len(tiles.row) == max_num_tiles(num_tokens, num_rows, 4, alignment)
        assert all(token % alignment == 0 for _, token, *_ in used(tiles))


def ranges(position: int, num_tokens: int, sliding_window: int | None) -> list[int]:
    return [
        int(x) for x in key_tiles(jnp.int32(position), jnp.int32(num_tokens), 8, sliding_window)
    ]


def test_only_key_tiles_on_the_diagonal_are_masked() -> None:
    assert ranges(position=16, num_tokens=4, sliding_window=None) == [0, 0, 2, 3]
    assert ranges(position=15, num_tokens=1, sliding_window=None) == [0, 0, 2, 2]


def test_key_tiles_before_the_window_are_skipped_and_its_edge_is_masked() -> None:
    # Queries 40 to 43 with 20 keys each: keys 21 to 43, and from 24 on all see them all.
    assert ranges(position=40, num_tokens=4, sliding_window=20) == [2, 3, 5, 6]


def test_a_short_window_masks_every_tile_once() -> None:
    assert ranges(position=40, num_tokens=4, sliding_window=2) == [4, 6, 6, 6]


def test_a_tile_without_keys_has_no_key_tiles() -> None:
    assert ranges(position=-50, num_tokens=4, sliding_window=None) == [0, 0, 0, 0]
    assert ranges(position=-50, num_tokens=4, sliding_window=3) == [0, 0, 0, 0]
