"""Paged attention: the one op the layers call; checks, picks a backend, merges decode and prefill.

A backend is a function for decode rows (one query token each, they come first), or one for ragged
rows (several query tokens). Each returns 0 for the tokens of the other. A backend that cannot
serve a shape raises NotImplementedError, and the next one in the list is asked; XLA serves
everything.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.backends import first_that_serves
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention_reference import paged_attention_reference
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

DECODE_FUNCTIONS = {
    "xla": "jaxengine.pallas_kernels.paged_attention_xla:paged_decode_xla",
    "triton": "jaxengine.pallas_kernels.paged_decode_triton:paged_decode_triton",
}
RAGGED_FUNCTIONS = {
    "xla": "jaxengine.pallas_kernels.paged_attention_xla:ragged_attention_xla",
    "triton": "jaxengine.pallas_kernels.ragged_attention_triton:ragged_attention_triton",
    "mosaic": "jaxengine.pallas_kernels.ragged_attention_mosaic:ragged_attention_mosaic",
}
# What decodes where a name means one of the ragged rows' backends only.
DECODE_OF = {"mosaic": "triton"}
# Mosaic's ragged kernel does 549 to 640 TFLOP/s (H100), Triton's 337 to 392 (H200). But each shape
# takes 2.8 s to compile.
MOSAIC_MIN_TOKENS = 4096


def paged_attention(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    query_start_loc: Int[Array, " B_plus_1"],
    num_decode_rows: Int[Array, ""] | int,
    *,
    options: AttentionOptions,
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    decode_only: bool = False,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Attend each query token to its row's keys in the cache, at or before its own position.

    The K/V of this step's tokens must already be in the cache. Shapes are local (under shard_map).

    Args:
        q: Packed query tokens of all rows; query head n uses KV head n // (N // K).
        k_cache: Keys of one layer. Never NaN or Inf, not even in unused slots.
        v_cache: Values, laid out like ``k_cache``.
        block_tables: Physical block ids of each row; unused entries hold any valid id.
        seq_lens: KV length of each row, this step's tokens included; 0 for a padding row.
        query_start_loc: First token of each row, and the end of the last.
        num_decode_rows: Rows before it have one query token, and row r's is token r.
        options: Scale, window and soft cap.
        alibi_slopes: slope[n] * (key position - query position) is added to the scores.
        sinks: Of each query head, a score that takes its share of the softmax and has no value
            (gpt-oss).
        decode_only: Every row is a decode row or padding, T == B; ``query_start_loc`` and
            ``num_decode_rows`` are not read.
        target: The devices.
        implementation: "reference", "xla", "triton" or "mosaic" (decode rows are then Triton's);
            None takes the fastest one of the target that serves the shape.

    Returns:
        Attention output in q.dtype; 0 for padding tokens.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``implementation`` is unknown.
        NotImplementedError: If the named ``implementation`` does not serve this shape.
    """
    _check_cache(q, k_cache, v_cache)
    _check_rows(q, block_tables, seq_lens, query_start_loc, decode_only)
    _check_heads(q, alibi_slopes=alibi_slopes, sinks=sinks)
    if implementation not in (None, "reference", *RAGGED_FUNCTIONS):
        known = ", ".join(("reference", *RAGGED_FUNCTIONS))
        raise ValueError(f"implementation {implementation!r} is not one of {known}")
    chosen = target.choice(implementation)
    if chosen == "reference":
        if decode_only:  # the tokens of padding rows see no key: their seq_len is 0
            query_start_loc = jnp.arange(q.shape[0] + 1)
        return paged_attention_reference(
            *(q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, alibi_slopes, sinks),
            options=options,
        )

    # Decode rows are the first tokens, so there are no more of them than tokens.
    rows = min(q.shape[0], block_tables.shape[0])
    decode_lens = seq_lens
    if not decode_only:
        decode_lens = jnp.where(jnp.arange(seq_lens.shape[0]) < num_decode_rows, seq_lens, 0)
    static: dict[str, Any] = {"options": options, "target": target}
    decoded = first_that_serves(
        DECODE_FUNCTIONS,
        _decode_order(chosen, target),
        *(q[:rows], k_cache, v_cache, block_tables[:rows], decode_lens[:rows]),
        *(alibi_slopes, sinks),
        **static,
    )
    if decode_only:
        return decoded
    ragged = first_that_serves(
        RAGGED_FUNCTIONS,
        _ragged_order(chosen, target, q.shape[0]),
        *(q, k_cache, v_cache, block_tables, seq_lens, query_start_loc),
        jnp.asarray(num_decode_rows, jnp.int32),
        *(alibi_slopes, sinks),
        **static,
    )
    # A scatter, as XLA does it in place, which it does not do with where() or a sum of the two.
    # (The barrier keeps XLA from fusing the update into a kernel call, which fails for Mosaic.)
    ragged = jax.lax.optimization_barrier(ragged)
    row = jnp.arange(rows)
    token = jnp.where(row < num_decode_rows, row, q.shape[0] + row)  # past the end: not written
    return ragged.at[token].set(decoded, mode="drop", indices_are_sorted=True, unique_indices=True)


def _decode_order(implementation: str | None, target: Target) -> Sequence[str]:
    if implementation is not None:
        return (DECODE_OF.get(implementation, implementation),)
    return ("triton", "xla") if target.is_gpu else ("xla",)


def _ragged_order(implementation: str | None, target: Target, num_tokens: int) -> Sequence[str]:
    """Mosaic needs Hopper, and seconds of compilation that only long steps pay back."""
    if implementation is not None:
        return (implementation,)
    if not target.is_gpu:
        return ("xla",)
    if num_tokens >= MOSAIC_MIN_TOKENS and target.is_hopper:
        return ("mosaic", "triton", "xla")
    return ("triton", "xla")


def _check_cache(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array) -> None:
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"k_cache is {k_cache.shape} but v_cache is {v_cache.shape}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q is {q.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[2]} but the cache has {k_cache.shape[3]}")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide by {k_cache.shape[1]} KV heads")
    if k_cache.shape[2] % 8:
        raise ValueError(f"block_size {k_cache.shape[2]} is not a multiple of 8")


def _check_rows(
    q: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    decode_only: bool,
) -> None:
    num_rows = block_tables.shape[0]
    if seq_lens.shape != (num_rows,) or query_start_loc.shape != (num_rows + 1,):
        raise ValueError(
            f"block_tables has {num_rows} rows but seq_lens is {seq_lens.shape} and "
            f"query_start_loc is {query_start_loc.shape}"
        )
    if decode_only and q.shape[0] != num_rows:
        raise ValueError(f"decode_only needs one token a row: {q.shape[0]} tokens, {num_rows} rows")


def _check_heads(q: jax.Array, **per_head: jax.Array | None) -> None:
    for name, array in per_head.items():
        if array is not None and array.shape != (q.shape[1],):
            raise ValueError(f"{name} is {array.shape}, not one for {q.shape[1]} heads")
