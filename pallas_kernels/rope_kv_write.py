"""From the fused projection to attention's inputs: head norms, rotary embedding, KV-cache write.

One op, because a decode step is mostly launches: XLA needs three to five kernels a layer for it,
the Triton one is a single launch.
"""

import jax
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.rope_kv_write_reference import CosSin, rope_kv_write_reference
from jaxengine.pallas_kernels.rope_kv_write_triton import rope_kv_write_triton
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

__all__ = ["CosSin", "rope_kv_write"]


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
        addends: The projection [S, T, K, G + 2, H] and its bias [K, G + 2, H]: per KV head its G
            queries, then its key and its value.
        cos_sin: float32 cosines and sines [T, R] of the tokens' angles; the first 2R of H
            dimensions are rotated. None for no rotation.
        slot_mapping: block_id * block_size + offset of each token. Padding tokens point into
            block 0, which nobody reads.
        k_cache: Key cache of the layer. Donate it, or XLA copies it each step.
        v_cache: Value cache, likewise.
        q_norm: Norm of each query head before the rotation, with a weight [H] for all heads or
            one for each, [N, H]; None for none.
        k_norm: Of each key head, [H] or [K, H].
        dtype: What the sum is rounded to.
        target: What the program is for.
        implementation: "reference", "triton", or None for the fastest that serves the shape.

    Returns:
        The queries [T, K * G, H], and both caches.

    Raises:
        ValueError: If ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the shape.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    arrays = (addends, cos_sin, slot_mapping, k_cache, v_cache)
    if implementation == "triton" or (implementation is None and target.is_gpu):
        try:
            return rope_kv_write_triton(*arrays, q_norm=q_norm, k_norm=k_norm, dtype=dtype)
        except NotImplementedError:
            if implementation is not None:
                raise
    return rope_kv_write_reference(*arrays, q_norm=q_norm, k_norm=k_norm, dtype=dtype)
