"""Attention of packed sequences without a cache, as one op: encoders and pooling models.

All keys of a sequence are in the same call as its queries. With a cache, see ``paged_attention``.
"""

import jax
from jaxengine.pallas_kernels.backends import first_that_serves
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.packed_attention_reference import packed_attention_reference
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

FUNCTIONS = {
    "xla": "jaxengine.pallas_kernels.packed_attention_xla:packed_attention_xla",
    "triton": "jaxengine.pallas_kernels.packed_attention_triton:packed_attention_triton",
}


def packed_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    query_start_loc: Int[Array, " B_plus_1"],
    *,
    options: AttentionOptions,
    is_causal: bool = False,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Attend each token to the tokens of its own sequence.

    Shapes are local (under shard_map).

    Args:
        q: Query tokens of all rows, packed; query head n uses KV head n // (N // K).
        k: Keys of the same tokens.
        v: Values.
        query_start_loc: First token of each row, and the end of the last.
        options: Scale, soft cap and window: a token at position p sees those in (p - window,
            p + window), of which a causal one sees none after p.
        is_causal: Whether a token sees none after it.
        target: The devices.
        implementation: "reference", "xla" or "triton"; None takes the fastest that serves.

    Returns:
        Attention output in q.dtype; 0 for padding tokens, which belong to no row.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``implementation`` is unknown.
        NotImplementedError: If the named ``implementation`` does not serve this shape.
    """
    if implementation not in (None, "reference", *FUNCTIONS):
        known = ", ".join(("reference", *FUNCTIONS))
        raise ValueError(f"implementation {implementation!r} is not one of {known}")
    _check(q, k, v)
    chosen = target.choice(implementation)
    if chosen == "reference":
        return packed_attention_reference(
            q, k, v, query_start_loc, options=options, is_causal=is_causal
        )
    best = ("triton", "xla") if target.is_gpu else ("xla",)
    out: jax.Array = first_that_serves(
        FUNCTIONS,
        best if chosen is None else (chosen,),
        *(q, k, v, query_start_loc),
        options=options,
        is_causal=is_causal,
        target=target,
    )
    return out


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k is {k.shape} but v is {v.shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}")
    if (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(f"q is {q.shape} but k is {k.shape}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide by {k.shape[1]} KV heads")
