"""SchedulerOutput -> one packed int32 vector: the only thing a step sends to the device."""

import itertools

import numpy as np

from jaxengine.batch import StepShape
from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput

NEWEST_TOKEN = -1  # stands for the row's newest sampled token, which only the device knows

TableUpdates = np.ndarray  # [3, n] int32: rows, columns, block ids


class BatchBuilder:
    """Fills the packed vector of ``jaxengine.batch`` from what the scheduler chose.

    Args:
        max_num_seqs: Number of slots; the slot after the last belongs to padding rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._null_slot = max_num_seqs

    def build(
        self, step: SchedulerOutput, shape: StepShape, *, is_greedy: bool
    ) -> tuple[np.ndarray, TableUpdates | None]:
        """Pack a step.

        Args:
            step: What the scheduler chose.
            shape: The padded sizes.
            is_greedy: Whether every row takes the most likely token, so that the forward step
                stores it as the newest one.

        Returns:
            The packed vector, and the table updates that did not fit into it (a request that
            comes back with many blocks), to be applied before the step.
        """
        rows = step.rows
        packed = np.zeros(shape.packed_size, np.int32)
        parts = packed_views(shape, packed)
        n = len(rows)
        _fill_token_ids(parts["token_ids"], step)
        parts["slots"][:n] = [row.request.slot for row in rows]
        parts["slots"][n:] = self._null_slot
        counts = [row.num_scheduled_tokens for row in rows]
        parts["query_lens"][:n] = counts
        parts["seq_lens"][:n] = [
            row.num_computed_tokens + count for row, count in zip(rows, counts, strict=True)
        ]
        parts["samples_token"][:n] = [row.samples_token for row in rows]
        parts["num_decode_rows"][0] = step.num_decode_rows
        parts["is_greedy"][0] = is_greedy
        overflow = self._fill_table_updates(shape, parts, step)
        return packed, overflow

    def _fill_table_updates(
        self, shape: StepShape, parts: dict[str, np.ndarray], step: SchedulerOutput
    ) -> TableUpdates | None:
        updates = table_updates(step)
        parts["table_rows"][:] = self._null_slot + 1  # past the end: dropped
        count = updates.shape[1]
        if count > shape.num_table_updates:
            return updates
        parts["table_rows"][:count] = updates[0]
        parts["table_columns"][:count] = updates[1]
        parts["table_blocks"][:count] = updates[2]
        return None


def packed_views(shape: StepShape, packed: np.ndarray) -> dict[str, np.ndarray]:
    """The named parts of a packed vector, to be read or filled in place."""
    views, start = {}, 0
    for name, size in shape.fields().items():
        views[name] = packed[start : start + size]
        start += size
    return views


def _fill_token_ids(token_ids: np.ndarray, step: SchedulerOutput) -> None:
    """Store each row's tokens; one that only the device knows is always alone in its row."""
    n = step.num_decode_rows
    token_ids[:n] = [
        NEWEST_TOKEN
        if row.is_token_on_device
        else row.request.all_token_ids[row.num_computed_tokens]
        for row in step.rows[:n]
    ]
    for row in step.rows[n:]:
        start, count = row.num_computed_tokens, row.num_scheduled_tokens
        token_ids[n : n + count] = row.request.all_token_ids[start : start + count]
        n += count


def table_updates(step: SchedulerOutput) -> TableUpdates:
    """Flatten the step's new block-table entries to [3, n] (row, column, block id)."""
    entries = step.new_block_entries
    rows = [slot for slot, _, blocks in entries for _ in blocks]
    columns = itertools.chain.from_iterable(
        range(first, first + len(blocks)) for _, first, blocks in entries
    )
    blocks = itertools.chain.from_iterable(blocks for _, _, blocks in entries)
    return np.array([rows, list(columns), list(blocks)], np.int32).reshape(3, -1)
