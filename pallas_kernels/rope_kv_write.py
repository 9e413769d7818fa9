"""From the fused projection to attention's inputs: head norms, rotary embedding, KV-cache write.

One op, because a decode step is mostly launches: XLA needs three to five kernels a layer for it,
the Triton one is a single launch.
"""

import jax
from jaxengine.pallas_kernels.backends import call_kernel
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.rope_kv_write_reference import CosSin, rope_kv_write_reference
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

TRITON = "jaxengine.pallas_kernels.rope_kv_write_triton:rope_kv_write_triton"


def rope_kv_write(
    addends: Addends,
    cos_sin: CosSin | None,
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    dtype: jax.typing.DTypeLike,
    target: Target,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "T N H"],
    Float[Array, "num_blocks K block_size H"],
    Float[Array, "num_blocks K block_size H"],
]:
    """Normalise and rotate queries and keys; store keys and values in the cache.

    Args:
        addends: Of the projection, [S, T, K, G + 2, H] with a bias [K, G + 2, H]: per KV head its G
            queries, then its key and its value.
        cos_sin: float32 cosines and sines of the tokens' angles, [T, R] each: the first 2R of H
            dimensions are rotated, the others are left as they are. None for no rotation.
        slot_mapping: block_id * block_size + offset of each token. Padding tokens point into
            block 0, which nobody reads.
        k_cache: Key cache of the layer. Donate it, or XLA copies it each step.
        v_cache: Value cache, likewise.
        q_norm: Norm of each query head before the rotation, with a weight [H] for all or [N, H]
            for each; None for none.
        k_norm: Of each key head, [H] or [K, H].
        dtype: What the sum of the addends is rounded to.
        target: The devices.
        implementation: "reference", "triton", or None for the fastest that serves the shape.

    Returns:
        The queries [T, K * G, H], and both caches.

    Raises:
        ValueError: If ``implementation`` is unknown, or shapes disagree.
        NotImplementedError: If "triton" was asked for and does not serve the shape.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    _check(addends, cos_sin, k_cache, q_norm, k_norm)
    chosen = target.choice(implementation)
    if chosen == "triton" or (chosen is None and target.is_gpu):
        try:
            return call_kernel(
                TRITON,
                *(addends, cos_sin, slot_mapping, k_cache, v_cache, q_norm, k_norm),
                dtype=dtype,
            )
        except NotImplementedError:
            if implementation is not None:
                raise
    return rope_kv_write_reference(
        *(addends, cos_sin, slot_mapping, k_cache, v_cache),
        q_norm=q_norm,
        k_norm=k_norm,
        dtype=dtype,
    )


def _check(
    addends: Addends,
    cos_sin: CosSin | None,
    k_cache: jax.Array,
    q_norm: Norm | None,
    k_norm: Norm | None,
) -> None:
    _, K, rows, H = addends.shape
    if cos_sin is not None and 2 * cos_sin[0].shape[1] > H:
        raise ValueError(f"{2 * cos_sin[0].shape[1]} dimensions are to be rotated of {H}")
    if (k_cache.shape[1], k_cache.shape[3]) != (K, H):
        raise ValueError(f"the projection has {K} KV heads of {H}, the cache is {k_cache.shape}")
    for name, norm, shape in (("q_norm", q_norm, (K * (rows - 2), H)), ("k_norm", k_norm, (K, H))):
        for array in jax.tree.leaves(norm):
            if array.shape not in ((H,), shape):
                raise ValueError(f"{name} has {array.shape}, neither {(H,)} nor {shape}")
