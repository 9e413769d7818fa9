"""Random paged-attention inputs: rows of (query tokens, KV length) over a shuffled block pool."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention_reference import paged_attention_reference
from jaxengine.pallas_kernels.target import Target

H100 = Target("gpu", "hopper")


class Problem(NamedTuple):
    """The arrays that the op takes, in its order."""

    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    num_decode_rows: jax.Array

    @property
    def decode_arguments(self) -> tuple[jax.Array, ...]:
        return self[:5]


def make_problem(
    rows: list[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    table_width: int = 24,
    padding_tokens: int = 0,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> Problem:
    """Rows in order, decode rows first; (0, 0) is a padding row. Unused cache blocks hold 1e4."""
    rng = np.random.default_rng(seed)
    blocks = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks = sum(blocks) + 5
    used = rng.permutation(num_blocks - 1)[: sum(blocks)] + 1
    block_tables = np.zeros((len(rows), table_width), np.int32)
    for row, end in enumerate(np.cumsum(blocks)):
        block_tables[row, : blocks[row]] = used[end - blocks[row] : end]

    def cache() -> jax.Array:
        values = np.full((num_blocks, num_kv_heads, block_size, head_dim), 1e4, np.float32)
        values[used] = rng.standard_normal((len(used), *values.shape[1:]))
        return jnp.asarray(values, dtype)

    query_lens = [query_len for query_len, _ in rows]
    num_tokens = sum(query_lens) + padding_tokens
    q = rng.standard_normal((num_tokens, num_kv_heads * group, head_dim))
    return Problem(
        q=jnp.asarray(q, dtype),
        k_cache=cache(),
        v_cache=cache(),
        block_tables=jnp.asarray(block_tables),
        seq_lens=jnp.asarray([seq_len for _, seq_len in rows], jnp.int32),
        query_start_loc=jnp.asarray(np.concatenate([[0], np.cumsum(query_lens)]), jnp.int32),
        num_decode_rows=jnp.int32(sum(query_len == 1 for query_len in query_lens)),
    )


def decode_problem(seq_lens: list[int], **shape: Any) -> Problem:
    """One query token a row, also for rows of length 0."""
    return make_problem([(1, seq_len) for seq_len in seq_lens], **shape)


def expected(problem: Problem, **scoring: Any) -> jax.Array:
    """What the reference gives, in float32."""
    out = paged_attention_reference(*problem[:6], **keywords(problem, **scoring))
    return out.astype(jnp.float32)


def keywords(
    problem: Problem, alibi_slopes: Any = None, sinks: Any = None, **options: Any
) -> dict[str, Any]:
    """How scores are made, as ops and backends take it; the options are AttentionOptions' own."""
    scale = float(problem.q.shape[-1] ** -0.5)
    return {
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "options": AttentionOptions(scale, **options),
    }


def tolerance(problem: Problem) -> float:
    """Largest difference allowed: outputs are about 1, so this is the rounding of the dtype."""
    return {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[problem.q.dtype.name]
