"""Tile sizes of the decode kernels, and what few rows are: what is measured best.

Numbers are from benchmarks/kernels.py --sweep; see benchmarks/LOG.md.
"""

from dataclasses import dataclass

# Rows up to which products come in parts, from kernels of ours (few_rows_triton.py).
FEW_ROWS = 32
# KV heads of all rows of a decode step, for each SM, up to which they are few: measured with 8
# heads and 8 to 64 rows.
FEW_HEADS_PER_SM = 2
MANY_QUERY_HEADS = 32  # of a KV head: above, four warps have too few registers


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel cuts and pipelines its work."""

    tile_kv: int = 64  # keys of one step of the loop
    num_stages: int = 3  # depth of the K/V pipeline
    num_warps: int = 4
    splits_per_sm: float = 4  # splits that an SM works on at a time
    min_split_tokens: int = 128


def triton_decode_config(
    head_dim: int, num_rows: int, num_kv_heads: int, group: int, num_sms: int
) -> DecodeConfig:
    """Return the tile sizes for decode with B = ``num_rows``."""
    tile_kv = 32 if head_dim > 128 else 64
    num_warps = 4 if group <= MANY_QUERY_HEADS else 8
    if num_rows * num_kv_heads <= FEW_HEADS_PER_SM * num_sms:
        # Programs are few. One an SM with a deep ring keeps as much on its way from memory as
        # several with short rings, and there is less to start and to merge.
        return DecodeConfig(tile_kv=tile_kv, num_stages=5, num_warps=num_warps, splits_per_sm=1)
    return DecodeConfig(tile_kv=tile_kv, num_warps=num_warps)


def num_extra_splits(config: DecodeConfig, num_kv_heads: int, num_sms: int) -> int:
    """Return how many splits beyond one a row keep every SM busy."""
    return max(1, int(config.splits_per_sm * num_sms // num_kv_heads))
