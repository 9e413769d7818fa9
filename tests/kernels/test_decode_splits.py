import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxengine.pallas_kernels.decode_splits import DecodeSplits, split_rows

NUM_ROWS = 6
NUM_EXTRA = 4
SPLIT_ROWS = {
    sliding_window: jax.jit(
        functools.partial(
            split_rows,
            num_extra=NUM_EXTRA,
            tile_kv=16,
            min_split_tokens=32,
            sliding_window=sliding_window,
        )
    )
    for sliding_window in (None, 20, 50)
}


def split(seq_lens: list[int], sliding_window: int | None = None) -> DecodeSplits:
    return SPLIT_ROWS[sliding_window](jnp.asarray(seq_lens, jnp.int32))


def stretches(splits: DecodeSplits) -> list[tuple[int, int, int, int]]:
    is_whole_row = splits.end_split - splits.first_split == 1
    columns = (splits.row, splits.start, splits.stop, is_whole_row)
    return [entry for entry in zip(*map(np.ndarray.tolist, map(np.asarray, columns)), strict=True)
            if entry[0] >= 0]  # fmt: skip


def test_rows_of_equal_length_are_not_split_when_they_fill_the_gpu() -> None:
    assert stretches(split([64, 64, 64, 64])) == [
        (0, 0, 64, 1), (1, 0, 64, 1), (2, 0, 64, 1), (3, 0, 64, 1),
    ]  # fmt: skip


def test_one_long_row_is_cut_into_equal_splits() -> None:
    assert stretches(split([256])) == [
        (0, 0, 64, 0), (0, 64, 128, 0), (0, 128, 192, 0), (0, 192, 256, 0),
    ]  # fmt: skip


def test_splits_are_never_shorter_than_asked() -> None:
    assert stretches(split([48])) == [(0, 0, 32, 0), (0, 32, 48, 0)]


def test_a_padding_row_has_one_empty_split() -> None:
    assert stretches(split([0, 16])) == [(0, 0, 0, 1), (1, 0, 16, 1)]


def test_keys_before_the_window_are_left_out_by_whole_tiles() -> None:
    assert stretches(split([100], sliding_window=20)) == [(0, 80, 100, 1)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 500), min_size=NUM_ROWS, max_size=NUM_ROWS),
    st.sampled_from([None, 50]),
)
def test_splits_cover_every_visible_key_once(seq_lens: list[int], window: int | None) -> None:
    splits = split(seq_lens, window)
    covered = [np.zeros(seq_len, int) for seq_len in seq_lens]
    for row, start, stop, is_whole_row in stretches(splits):
        covered[row][start:stop] += 1
        assert is_whole_row == (splits.row.tolist().count(row) == 1)
    rows = splits.row.tolist()
    for row, first, end in zip(
        rows, *map(np.ndarray.tolist, map(np.asarray, splits[3:])), strict=True
    ):
        assert rows[first:end] == ([row] * rows.count(row) if row >= 0 else [])
    for seq_len, count in zip(seq_lens, covered, strict=True):
        first = 0 if window is None else max(0, seq_len - window) // 16 * 16
        assert count[first:].tolist() == [1] * (seq_len - first)
        assert not count[:first].any()
