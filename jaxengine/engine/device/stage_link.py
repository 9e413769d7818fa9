"""StageLink: takes arrays from the devices of one pipeline stage to those of another."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxengine.sharding import TENSOR_AXIS, replicated

STAGE_AXIS = "stage"


class StageLink:
    """Copies an array that every device of the source holds to every device of the target.

    Within one process this is a copy from device to device. Between processes it is a collective
    over both stages' devices, which every process launches, whether it has any of them or not.

    Args:
        source: Devices of one stage.
        target: As many devices of another.
    """

    def __init__(self, source: Mesh, target: Mesh) -> None:
        self._source, self._target = source, target
        self._programs: dict[tuple, jax.stages.Compiled] = {}
        self._blanks: dict[tuple, list[jax.Array]] = {}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Dispatch the copy; returns at once."""
        if jax.process_count() == 1:
            return jax.device_put(x, replicated(self._target))
        key = (x.shape, x.dtype)
        if key not in self._programs:
            self._programs[key] = self._compile(*key)
            self._blanks[key] = self._zeros_on_target(*key)
        sharding, shape = self._joint_layout(x.shape)
        shards = [shard.data for shard in x.addressable_shards] + self._blanks[key]
        both = jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=x.dtype)
        moved = self._programs[key](both)
        mine = [shard.data for shard in moved.addressable_shards if shard.index[0].start]
        return jax.make_array_from_single_device_arrays(
            x.shape, replicated(self._target), mine, dtype=x.dtype
        )

    @functools.cached_property
    def _joint(self) -> Mesh:
        devices = np.stack([self._source.devices, self._target.devices])
        return Mesh(devices, (STAGE_AXIS, TENSOR_AXIS))

    def _joint_layout(self, shape: tuple[int, ...]) -> tuple[NamedSharding, tuple[int, ...]]:
        """Layout of the source's array with the target's behind it."""
        return NamedSharding(self._joint, P(STAGE_AXIS)), (2 * shape[0], *shape[1:])

    def _zeros_on_target(self, shape: tuple[int, ...], dtype: np.dtype) -> list[jax.Array]:
        here = jax.process_index()
        own = [device for device in self._target.devices.flat if device.process_index == here]
        return [jax.device_put(np.zeros(shape, dtype), device) for device in own]

    def _compile(self, shape: tuple[int, ...], dtype: np.dtype) -> jax.stages.Compiled:
        sharding, joint_shape = self._joint_layout(shape)
        send = jax.shard_map(
            lambda x: jax.lax.ppermute(x, STAGE_AXIS, [(0, 1)]),
            mesh=self._joint,
            in_specs=P(STAGE_AXIS),
            out_specs=P(STAGE_AXIS),
            check_vma=False,
        )
        return (
            jax.jit(send)
            .lower(jax.ShapeDtypeStruct(joint_shape, dtype, sharding=sharding))
            .compile()
        )
