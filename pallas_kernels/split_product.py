"""A matrix product as an op whose result comes in parts, to be added up by whoever reads it.

With few rows the product is cut along its inner dimension to fill the GPU, and the sum of its parts
would be a kernel of its own; the ops that take its result anyway add them up on the way:
``residual_norm`` and ``rope_kv_write``.
"""

from jaxengine.pallas_kernels.backends import call_kernel
from jaxengine.pallas_kernels.split_product_reference import project, split_product_reference
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float

__all__ = ["project", "split_product"]

TRITON = "jaxengine.pallas_kernels.few_rows_triton:split_product_triton"


def split_product(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    *,
    target: Target,
    implementation: str | None = None,
) -> Float[Array, "S T O"]:
    """Return ``x W^T`` in parts: several in float32, or one in x's dtype.

    Shapes are local (under shard_map).

    Args:
        x: Rows.
        weight: [out, in].
        target: The devices.
        implementation: "reference", "triton", or None for the fastest that serves the shape.

    Raises:
        ValueError: If shapes or dtypes disagree, or ``implementation`` is unknown.
        NotImplementedError: If "triton" was asked for and does not serve the shape.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)} but weight is {weight.dtype}{list(weight.shape)}"
        )
    chosen = target.choice(implementation)
    if chosen == "triton" or (chosen is None and target.is_gpu):
        try:
            return call_kernel(TRITON, x, weight)
        except NotImplementedError:
            if implementation is not None:
                raise
    return split_product_reference(x, weight)
