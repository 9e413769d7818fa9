import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_tiles import RaggedTiles, build_ragged_tiles, key_tiles, max_num_tiles


def build(
    query_lens: list[int], seq_lens: list[int], num_decode_rows: int, num_tokens: int
) -> RaggedTiles:
    return build_ragged_tiles(
        jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32),
        jnp.asarray(seq_lens, jnp.int32),
        jnp.asarray(num_decode_rows, jnp.int32),
        num_tokens=num_tokens,
        tile_q=4,
    )


def used(tiles: RaggedTiles) -> list[tuple[int, ...]]:
    """Tiles that are not empty, as (row, token, num_tokens, position)."""
    return [
        entry
        for entry in zip(*map(np.ndarray.tolist, map(np.asarray, tiles[:4])), strict=True)
        if entry[2]
    ]


def test_the_tiles_of_a_row_come_longest_context_first() -> None:
    tiles = build([10], [10], 0, num_tokens=10)
    assert used(tiles) == [(0, 8, 2, 8), (0, 4, 4, 4), (0, 0, 4, 0)]
    assert tiles.num_tiles.tolist() == [3]


def test_rows_are_ordered_by_context_and_offset_by_their_cached_prefix() -> None:
    tiles = build([3, 5], [3, 105], 0, num_tokens=8)
    assert used(tiles) == [(1, 7, 1, 104), (1, 3, 4, 100), (0, 0, 3, 0)]


def test_decode_rows_and_padding_tokens_get_tiles_without_keys() -> None:
    tiles = build([1, 1, 4], [9, 9, 4], 2, num_tokens=11)
    with_keys = [entry for entry in used(tiles) if entry[3] + entry[2] > 0]
    without_keys = [entry for entry in used(tiles) if entry[3] + entry[2] <= 0]
    assert with_keys == [(2, 2, 4, 0)]
    assert sorted((token, count) for _, token, count, _ in without_keys) == [
        (0, 2),
        (6, 4),
        (10, 1),
    ]


def test_the_static_length_holds_any_batch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        query_lens = rng.integers(1, 12, size=rng.integers(1, 6)).tolist()
        num_tokens = sum(query_lens) + int(rng.integers(0, 9))
        tiles = build(query_lens, query_lens, 0, num_tokens)
        assert tiles.num_tiles[0] <= max_num_tiles(num_tokens, len(query_lens), 4) == len(tiles.row)
        covered = sorted(
            t for _, first, count, _ in used(tiles) for t in range(first, first + count)
        )
        assert covered == list(range(num_tokens))


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
