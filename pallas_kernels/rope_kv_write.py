"""From the fused projection to attention's inputs: head norms, rotary embedding, KV-cache write.

One op, because a decode step is mostly launches: XLA needs three to five kernels a layer for it,
the Triton one is a single launch.
"""

import jax
from jaxengine.pallas_kernels.rope_kv_write_reference import HeadNorm, rope_kv_write_reference
from jaxengine.pallas_kernels.rope_kv_write_triton import rope_kv_write_triton
from jaxtyping import Array, Float, Int

__all__ = ["HeadNorm", "rope_kv_write"]


def rope_kv_write(
    parts: Float[Array, "S T K G_plus_2 H"],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
    slot_mapping: Int[Array, " T"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    *,
    norm: HeadNorm | None = None,
    dtype: jax.typing.DTypeLike,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "T N H"],
    Float[Array, "num_blocks K block_size H"],
    Float[Array, "num_blocks K block_size H"],
]:
    """Normalise and rotate queries and keys; store keys and values in the cache.

    Args:
        parts: Of the projection, to be added up (``split_product``): per KV head its G queries,
            then its key and its value.
        cos: float32 cosines of the tokens' angles; the first 2R of H dimensions are rotated.
        sin: The sines.
        slot_mapping: block_id * block_size + offset of each token. Padding tokens point into
            block 0, which nobody reads.
        k_cache: Key cache of the layer. Donate it, or XLA copies it each step.
        v_cache: Value cache, likewise.
        norm: Norms of each query and key head before the rotation; None for none.
        dtype: What the sum of the parts is rounded to.
        implementation: "reference", "triton", or None for the fastest that serves the shape.

    Returns:
        The queries [T, K * G, H], and both caches.

    Raises:
        ValueError: If ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the shape.
    """
    arrays = (parts, cos, sin, slot_mapping, k_cache, v_cache)
    if implementation == "reference":
        return rope_kv_write_reference(*arrays, norm=norm, dtype=dtype)
    if implementation == "triton":
        return rope_kv_write_triton(*arrays, norm=norm, dtype=dtype)
    if implementation is not None:
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    if jax.default_backend() == "gpu":
        try:
            return rope_kv_write_triton(*arrays, norm=norm, dtype=dtype)
        except NotImplementedError:
            pass
    return rope_kv_write_reference(*arrays, norm=norm, dtype=dtype)
