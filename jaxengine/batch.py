"""InputBatch: the pytree that a model sees, unpacked on the device from one int32 vector.

The host sends as little as it can: per token its id, per row its slot and lengths. Positions and
cache slots follow from those and from the block tables, which stay on the device.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxengine.pallas_kernels.peers import Peers


@dataclasses.dataclass(frozen=True)
class CachePlace:
    """Where a layer's keys and values are.

    Attributes:
        group: Whose block table counts.
        array: Number of the cache among those of the stage.
    """

    group: int
    array: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputBatch:
    """T packed query tokens of B rows; rows with a single token (decode) come first.

    Attributes:
        decode_only: Static. Every row has one token: row r's is token r, and T == B.
        last_tokens_only: Static. Of the output only each row's last token is read: what comes
            after the cache has been written can be left out for the others.
        peers: How sums over the shards go; None for XLA's way.
        segment_ids: Tokens of equal ids are a sequence, whole: attention is among them alone, and
            the caches, [T, K, 1, H] each, just hold what they are. None for paged caches.
    """

    token_ids: Int[Array, " T"]
    positions: Int[Array, " T"]
    slot_mapping: Int[Array, " T"]  # block_id * block_size + offset; padding: inside block 0
    block_tables: Int[Array, "B W"]  # physical block ids; unused entries 0
    seq_lens: Int[Array, " B"]  # KV length with this step's tokens; 0 for a padding row
    query_start_loc: Int[Array, " B_plus_1"]
    num_decode_rows: Int[Array, ""]
    logits_indices: Int[Array, " B"]  # each row's last token
    decode_only: bool = dataclasses.field(metadata={"static": True})
    last_tokens_only: bool = dataclasses.field(default=False, metadata={"static": True})
    peers: Peers | None = None
    segment_ids: Int[Array, " T"] | None = None

    @property
    def is_real_token(self) -> Bool[Array, " T"]:
        """Which tokens are no padding."""
        return jnp.arange(self.token_ids.shape[0]) < self.query_start_loc[-1]

    @property
    def is_real_row(self) -> Bool[Array, " B"]:
        """Which rows are no padding."""
        return self.seq_lens > 0

    def of_group(self, group: int) -> "InputBatch":
        """Return the batch with the block table of one group of layers."""
        assert group == 0, "there is one group"
        return self

    def after_sums(self, num_sums: int) -> "InputBatch":
        """Return the batch as it is behind so many sums over the shards."""
        if self.peers is None:
            return self
        return dataclasses.replace(self, peers=self.peers.after(num_sums))


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The padded sizes of a step: one compiled program each.

    Attributes:
        num_tokens: T, packed query tokens.
        num_rows: B. Equal to T in a decode-only step.
        decode_only: Whether every row has exactly one token.
    """

    num_tokens: int
    num_rows: int
    decode_only: bool

    @property
    def num_table_updates(self) -> int:
        """Entries of the block tables that one step can change: a new block a row and chunk."""
        return self.num_rows + (0 if self.decode_only else self.num_tokens // 8)

    def fields(self) -> dict[str, int]:
        """The parts of the packed vector, in order: name -> number of int32."""
        return {
            "token_ids": self.num_tokens,
            "slots": self.num_rows,
            "seq_lens": self.num_rows,
            "query_lens": self.num_rows,
            "samples_token": self.num_rows,
            "table_rows": self.num_table_updates,
            "table_columns": self.num_table_updates,
            "table_blocks": self.num_table_updates,
            "num_decode_rows": 1,
            "is_greedy": 1,
            "step_number": 1,
        }

    @property
    def packed_size(self) -> int:
        """Length of the packed int32 vector."""
        return sum(self.fields().values())


def split_packed(shape: StepShape, packed: Int[Array, " P"]) -> dict[str, Int[Array, " n"]]:
    """Cut the packed vector into its named parts."""
    parts, start = {}, 0
    for name, size in shape.fields().items():
        parts[name] = packed[start : start + size]
        start += size
    return parts


def update_tables(
    tables: Int[Array, "S W"],
    rows: Int[Array, " n"],
    columns: Int[Array, " n"],
    blocks: Int[Array, " n"],
) -> Int[Array, "S W"]:
    """Store new block ids; a padding entry names a row past the end and is dropped."""
    return tables.at[rows, columns].set(blocks, mode="drop")


def build_input_batch(
    shape: StepShape,
    parts: dict[str, Int[Array, " n"]],
    tables: Int[Array, "S W"],
    last_tokens: Int[Array, " S"],
    block_size: int,
    *,
    last_tokens_only: bool = False,
    peers: Peers | None = None,
) -> InputBatch:
    """Derive everything that the model needs from the packed parts.

    Args:
        shape: Padded sizes of this step.
        parts: From ``split_packed``. A negative token id stands for the newest token of its row,
            which only the device knows (the host reads sampled tokens one step late).
        tables: Block table of every slot; the last row belongs to no slot and holds zeros.
        last_tokens: Newest sampled token of every slot.
        block_size: Tokens a KV block holds.
        last_tokens_only: Whether only the rows' last tokens are read of the output.
        peers: With the number of the step's first sum over the shards.
    """
    slots, seq_lens, query_lens = parts["slots"], parts["seq_lens"], parts["query_lens"]
    block_tables = tables[slots]
    ends = jnp.cumsum(query_lens)
    query_start_loc = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    tokens = jnp.arange(shape.num_tokens, dtype=jnp.int32)
    if shape.decode_only:
        row_of_token = tokens
        positions = jnp.maximum(seq_lens - 1, 0)
        is_real = seq_lens > 0
        num_decode_rows = jnp.sum(is_real, dtype=jnp.int32)
    else:
        row_of_token = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
        is_real = row_of_token < shape.num_rows
        row_of_token = jnp.minimum(row_of_token, shape.num_rows - 1)
        first_position = (seq_lens - query_lens)[row_of_token]
        positions = jnp.where(is_real, first_position + tokens - query_start_loc[row_of_token], 0)
        num_decode_rows = parts["num_decode_rows"][0]
    newest = last_tokens[jnp.minimum(slots, last_tokens.shape[0] - 1)][row_of_token]
    token_ids = jnp.where(parts["token_ids"] < 0, newest, parts["token_ids"])
    column = jnp.minimum(positions // block_size, tables.shape[1] - 1)
    slot_mapping = block_tables[row_of_token, column] * block_size + positions % block_size
    return InputBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=jnp.where(is_real, slot_mapping, 0),
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        num_decode_rows=num_decode_rows,
        logits_indices=jnp.maximum(ends - 1, 0),
        decode_only=shape.decode_only,
        last_tokens_only=last_tokens_only,
        peers=peers,
    )
