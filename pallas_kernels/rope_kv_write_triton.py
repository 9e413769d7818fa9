"""Head norms, rotary embedding and KV-cache write in one Pallas Triton kernel.

Grid (K, T): a program takes one KV head of one token: its G queries, its key and its value. The
caches are updated in place (aliased). Rounding is that of the reference, step by step.
Limits: bfloat16 or float16; the whole head is rotated; else NotImplementedError.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.residual_norm_triton import add_up
from jaxengine.pallas_kernels.rope_kv_write_reference import HeadNorm
from jaxtyping import Array, Float, Int


class _Problem(NamedTuple):
    """What is fixed at compile time."""

    group: int
    half: int  # H / 2
    block_size: int
    eps: float | None  # of the head norms; None for none


def rope_kv_write_triton(
    parts: Float[Array, "S T K G_plus_2 H"],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    *,
    norm: HeadNorm | None = None,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``rope_kv_write``.

    Raises:
        NotImplementedError: If the dtype is not of 16 bits, the cache's differs, or only a part
            of the head is rotated.
    """
    head_dim = parts.shape[4]
    if dtype not in (jnp.bfloat16, jnp.float16) or k_cache.dtype != dtype:
        raise NotImplementedError(f"dtypes {dtype} and {k_cache.dtype}: not one 16-bit type")
    if 2 * cos.shape[1] != head_dim:
        raise NotImplementedError(f"{2 * cos.shape[1]} of {head_dim} dimensions are rotated")
    problem = _Problem(
        group=parts.shape[3] - 2,
        half=head_dim // 2,
        block_size=k_cache.shape[2],
        eps=None if norm is None else norm.eps,
    )
    weights = () if norm is None else (norm.q_weight, norm.k_weight)
    return _launch(problem, interpret, parts, cos, sin, slot_mapping, k_cache, v_cache, *weights)


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _launch(
    problem: _Problem,
    interpret: bool,
    parts: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, T, K, _, H = parts.shape
    queries = jax.ShapeDtypeStruct((T, K * problem.group, H), k_cache.dtype)
    caches = [jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype)] * 2
    outputs = pl.pallas_call(
        functools.partial(_kernel, problem),
        grid=(K, T),
        out_shape=(queries, *caches),
        input_output_aliases={4: 1, 5: 2},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rope_kv_write",
    )(parts, cos, sin, slot_mapping, k_cache, v_cache, *weights)
    return outputs[0], outputs[1], outputs[2]


def _kernel(
    problem: _Problem,
    parts_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    slot_ref: Any,
    _k_cache_ref: Any,
    _v_cache_ref: Any,
    *rest: Any,
) -> None:
    *weight_refs, q_out_ref, k_out_ref, v_out_ref = rest
    head, token = pl.program_id(0), pl.program_id(1)
    group, half = problem.group, problem.half
    columns = jnp.arange(pl.next_power_of_2(half))
    is_real = columns < half
    rows = jnp.arange(pl.next_power_of_2(group))
    is_query = (rows < group)[:, None] & is_real[None, :]
    cos = plt.load(cos_ref.at[token, columns], mask=is_real, other=0.0)
    sin = plt.load(sin_ref.at[token, columns], mask=is_real, other=0.0)

    def load(row: Any, columns: jax.Array, mask: jax.Array) -> jax.Array:
        parts = [
            plt.load(parts_ref.at[part, token, head, row, columns], mask=mask, other=0.0)
            for part in range(parts_ref.shape[0])
        ]
        return add_up(parts).astype(q_out_ref.dtype)

    def load_row(row: int, offset: int) -> jax.Array:
        return load(row, columns + offset, is_real)

    def load_queries(offset: int) -> jax.Array:
        return load(rows[:, None], (columns + offset)[None, :], is_query)

    def normalised(first: jax.Array, second: jax.Array, weight: int) -> tuple[jax.Array, jax.Array]:
        if problem.eps is None:
            return first, second
        dtype = first.dtype
        first32, second32 = first.astype(jnp.float32), second.astype(jnp.float32)
        squares = jnp.sum(first32 * first32 + second32 * second32, axis=-1, keepdims=True)
        scale = lax.rsqrt(squares / (2 * half) + problem.eps)
        ref = weight_refs[weight]
        low = plt.load(ref.at[columns], mask=is_real, other=0.0)
        high = plt.load(ref.at[columns + half], mask=is_real, other=0.0)
        return (first32 * scale).astype(dtype) * low, (second32 * scale).astype(dtype) * high

    def rotated(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = first.dtype
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        low, high = first * cos - second * sin, second * cos + first * sin
        return low.astype(dtype), high.astype(dtype)

    queries = rotated(*normalised(load_queries(0), load_queries(half), 0))
    heads = head * group + rows
    slot = slot_ref[token]
    block, offset = lax.div(slot, problem.block_size), lax.rem(slot, problem.block_size)
    key = rotated(*normalised(load_row(group, 0), load_row(group, half), 1))
    value = load_row(group + 1, 0), load_row(group + 1, half)
    for part in (0, 1):
        target = columns + part * half
        where = q_out_ref.at[token, heads[:, None], target[None, :]]
        plt.store(where, queries[part], mask=is_query)
        plt.store(k_out_ref.at[block, head, offset, target], key[part], mask=is_real)
        plt.store(v_out_ref.at[block, head, offset, target], value[part], mask=is_real)
