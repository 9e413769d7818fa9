"""The sum of an array over the devices of a mesh axis, and few numbers of all of them, as ops.

XLA's collectives are the specification and serve everything. GPUs that reach each other's memory
are faster with a kernel that writes there, which needs to know where: ``Peers``.
"""

import jax
from jaxengine.pallas_kernels.backends import call_kernel
from jaxengine.pallas_kernels.peers import Peers
from jaxtyping import Array, Float, Int

SUM = "jaxengine.pallas_kernels.all_reduce_triton:all_reduce_triton"
GATHER = "jaxengine.pallas_kernels.all_reduce_triton:all_gather_triton"


def all_reduce(
    x: Float[Array, "T D"],
    peers: Peers | None,
    *,
    axis_name: str,
    residual: Float[Array, "T D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Return the sum of ``x`` over a mesh axis and a residual, the same bits on each device.

    Args:
        x: This device's part.
        peers: With the number of this sum; None where XLA's collective has to serve.
        axis_name: Of the mesh, under ``shard_map``.
        residual: Added to the sum, once; the same on all devices. None for none.
        implementation: "reference", "triton", or None for the fastest that serves the array.

    Raises:
        ValueError: If ``implementation`` is unknown, or "triton" without peers.
        NotImplementedError: If "triton" was asked for and does not serve the array.
    """
    if implementation not in (None, "reference", "triton"):
        raise ValueError(f"implementation {implementation!r} is not one of reference, triton")
    if implementation == "triton" and peers is None:
        raise ValueError("implementation 'triton' writes into the peers' memory: pass peers")
    if peers is not None and implementation != "reference":
        try:
            return call_kernel(SUM, x, peers, residual)
        except NotImplementedError:
            if implementation is not None:
                raise
    total = jax.lax.psum(x, axis_name)
    return total if residual is None else residual + total


def all_gather(x: Int[Array, "T D"], peers: Peers | None, *, axis_name: str) -> Int[Array, "N T D"]:
    """Return the arrays of all devices of a mesh axis, in their order.

    Args:
        x: This device's, int32.
        peers: With the number of this call; None where XLA's collective has to serve.
        axis_name: Of the mesh, under ``shard_map``.
    """
    if peers is not None:
        try:
            return call_kernel(GATHER, x, peers)
        except NotImplementedError:
            pass
    return jax.lax.all_gather(x, axis_name)
