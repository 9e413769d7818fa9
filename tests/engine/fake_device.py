"""A two-layer causal "transformer" of hashes over a paged memory, in numpy.

It sees of the engine what the real device sees: rows, new block-table entries, and the
tokens it sampled itself. Layer 0 stores (token, position); layer 1 stores at each
position a hash of all of layer 0 that the position sees; the next token is a hash of
all of layer 1 that the last position sees. As in the real model a layer's values are
written for all rows of a step before any row reads them. Everything is read back
through the block table, so a wrong block, a lost write or a stale prefix changes tokens.
The seed enters the last hash, so requests with one prompt may go different ways.
"""

import zlib

import numpy as np

from jaxengine.engine.scheduling.block_pool import NULL_BLOCK_ID
from jaxengine.engine.scheduling.scheduler_output import ScheduledRow, SchedulerOutput

VOCAB_SIZE = 23
GARBAGE = -(10**15)


def embed(token: int, position: int) -> int:
    return token * 1_000_003 + position


def digest(values: np.ndarray) -> int:
    return zlib.crc32(values.tobytes())


def sample(seen: np.ndarray, seed: int | None) -> int:
    return (digest(seen) ^ (seed or 0)) * 2_654_435_761 % 2**32 * VOCAB_SIZE >> 32


def tokens_alone(
    prompt: list[int], num_tokens: int, seed: int | None, window: int | None
) -> list[int]:
    """The tokens the model generates for a request that has the device to itself."""
    window = window or 10**9
    tokens = list(prompt)
    layer_0 = np.empty(len(prompt) + num_tokens, np.int64)
    layer_1 = np.empty_like(layer_0)
    for position in range(len(prompt) + num_tokens - 1):
        seen = slice(max(0, position - window + 1), position + 1)
        layer_0[position] = embed(tokens[position], position)
        layer_1[position] = digest(layer_0[seen])
        if position + 1 == len(tokens):
            tokens.append(sample(layer_1[seen], seed))
    return tokens[len(prompt) :]


class FakeDevice:
    """Paged memory, block table and newest tokens, changed by steps in order."""

    def __init__(
        self, num_blocks: int, block_size: int, num_slots: int, max_len: int, window: int | None
    ) -> None:
        self._block_size = block_size
        self._window = window or 10**9
        self._layers = np.full((2, num_blocks * block_size), GARBAGE, np.int64)
        self._block_table = np.full((num_slots, -(-max_len // block_size)), num_blocks - 1)
        self._last_tokens = np.full(num_slots, GARBAGE, np.int64)

    def run(self, step: SchedulerOutput) -> list[int]:
        """Compute a step; one token a row, garbage where none is sampled."""
        for slot, first, block_ids in step.new_block_entries:
            self._block_table[slot, first : first + len(block_ids)] = block_ids
        self._check_writes(step.rows)
        for row in step.rows:
            self._write(0, row, [embed(t, p) for t, p in zip(*self._tokens(row), strict=True)])
        for row in step.rows:
            self._write(1, row, [digest(self._seen(0, row, p)) for p in self._positions(row)])
        return [self._sample(row) for row in step.rows]

    def _positions(self, row: ScheduledRow) -> range:
        return range(row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens)

    def _tokens(self, row: ScheduledRow) -> tuple[list[int], range]:
        positions = self._positions(row)
        if row.is_token_on_device:
            assert len(positions) == 1
            return [int(self._last_tokens[row.request.slot])], positions
        return list(row.request.all_token_ids[positions.start : positions.stop]), positions

    def _slots(self, row: ScheduledRow, positions: np.ndarray) -> np.ndarray:
        blocks = self._block_table[row.request.slot, positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size

    def _write(self, layer: int, row: ScheduledRow, values: list[int]) -> None:
        self._layers[layer, self._slots(row, np.array(self._positions(row)))] = values

    def _seen(self, layer: int, row: ScheduledRow, position: int) -> np.ndarray:
        positions = np.arange(max(0, position - self._window + 1), position + 1)
        return self._layers[layer, self._slots(row, positions)]

    def _sample(self, row: ScheduledRow) -> int:
        if not row.samples_token:
            return GARBAGE
        seed = row.request.sampling_params.seed
        token = sample(self._seen(1, row, self._positions(row)[-1]), seed)
        self._last_tokens[row.request.slot] = token
        return token

    def _check_writes(self, rows: list[ScheduledRow]) -> None:
        written = np.concatenate([self._slots(row, np.array(self._positions(row))) for row in rows])
        assert len(set(written.tolist())) == len(written), "two rows write to one place"
        assert NULL_BLOCK_ID not in written // self._block_size, "a token's K/V would be lost"
        slots = [row.request.slot for row in rows]
        assert len(set(slots)) == len(slots), "two rows share a slot"
