"""The sum of an array over the devices of a mesh axis, as one op.

XLA's collective is the specification and serves everything. GPUs that reach each other's memory are
faster with a kernel that writes there, which needs to know where: ``Peers``.
"""

import jax
from jaxtyping import Array, Float

from pallas_kernels.all_reduce_triton import all_reduce_triton
from pallas_kernels.peers import Peers


def all_reduce(
    x: Float[Array, "T D"],
    peers: Peers | None,
    *,
    axis_name: str,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Return the sum of ``x`` over a mesh axis, the same bits on each device.

    Args:
        x: This device's part.
        peers: With the number of this sum; None where XLA's collective has to serve.
        axis_name: Of the mesh, under ``shard_map``.
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
            return all_reduce_triton(x, peers)
        except NotImplementedError:
            if implementation is not None:
                raise
    return jax.lax.psum(x, axis_name)
