"""Memory of each GPU of a tensor-parallel group that the others write to, for sums over the group.

The kernels of ``pallas_kernels/all_reduce_triton.py`` are given addresses, as jax has no word for
another device's memory. So the arrays have to stay alive, and their GPUs in one process.
"""

import ctypes
import itertools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxengine.pallas_kernels.peers import InboxLayout
from jaxengine.sharding import TENSOR_AXIS, replicate, replicated

# Of XLA's allocators those whose memory other GPUs can reach once peer access is on.
REACHABLE_ALLOCATORS = ("", "default", "bfc", "platform")


class PeerMemory:
    """Inboxes on all devices of a mesh.

    Args:
        mesh: GPUs of this process that reach each other.
        layout: Of each inbox.
    """

    def __init__(self, mesh: Mesh, layout: InboxLayout) -> None:
        self._mesh = mesh
        self.layout = layout

    def allocate(self) -> None:
        """Make the inboxes, all zeros: the number of no sum."""
        sharding = NamedSharding(self._mesh, P(TENSOR_AXIS))
        shape = (self.layout.num_gpus, self.layout.num_bytes // 4)
        zeros = jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=sharding)
        self._inboxes = jax.block_until_ready(zeros())
        shards = {shard.device: shard.data for shard in self._inboxes.addressable_shards}
        pointers = [shards[d].unsafe_buffer_pointer() for d in self._mesh.devices.flat]
        halves = np.array([(p & 0xFFFFFFFF, p >> 32) for p in pointers], np.uint32)
        self.addresses: Int[Array, "N 2"] = replicate(halves.view(np.int32), self._mesh)

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape of ``addresses``, to compile with before they are known."""
        shape = (self.layout.num_gpus, 2)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(self._mesh))


def reach_each_other(devices: Sequence[jax.Device]) -> bool:
    """Whether kernels on each of some devices can write to the memory of all others.

    They are GPUs of this process, the driver allows it (NVLink, or PCIe without a barrier in
    between), and XLA takes memory in a way that it applies to.
    """
    here = jax.process_index()
    if any(d.platform != "gpu" or d.process_index != here for d in devices):
        return False
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() not in REACHABLE_ALLOCATORS:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # another vendor's GPU
        return False
    ordinals = [device.local_hardware_id for device in devices]
    return all(_can_access(driver, *pair) for pair in itertools.permutations(ordinals, 2))


def _can_access(driver: ctypes.CDLL, ordinal: int, peer: int) -> bool:
    handles = (ctypes.c_int(), ctypes.c_int())
    for handle, number in zip(handles, (ordinal, peer), strict=True):
        if driver.cuDeviceGet(ctypes.byref(handle), number) != 0:
            return False
    answer = ctypes.c_int()
    status = driver.cuDeviceCanAccessPeer(ctypes.byref(answer), *handles)
    return status == 0 and bool(answer.value)
