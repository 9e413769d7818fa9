"""Meshes and the one mesh axis that model code names.

The whole step runs under one ``shard_map``: layers see the local shapes of their shard and reduce
explicitly, so the number of collectives is what the code says and never what a partitioner chose.
"""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

TENSOR_AXIS = "tp"
LOGITS_SPEC = P(None, TENSOR_AXIS)  # each device has the logits of its part of the vocabulary


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Return the mesh of one tensor-parallel group: axis "tp" over ``devices``."""
    return Mesh(np.array(devices), (TENSOR_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device of the mesh holds the whole array."""
    return NamedSharding(mesh, P())


def replicate(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Put a host array on every device of a mesh, each process on its own (no collective)."""
    return put(x, replicated(mesh))


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Cut a host array over a mesh, each process on its own (no collective)."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index], dtype=x.dtype)


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Cut the layers into runs whose lengths differ by one at most, the last ones the shorter.

    The last stage also computes the logits.

    Raises:
        ValueError: If there are fewer layers than stages.
    """
    if num_stages > num_layers:
        raise ValueError(
            f"pipeline_parallel_size {num_stages} is more than the model's {num_layers} layers: "
            f"use at most {num_layers}"
        )
    shortest, longer = divmod(num_layers, num_stages)
    ends = [0]
    for stage in range(num_stages):
        ends.append(ends[-1] + shortest + (stage < longer))
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def held_kv_heads(num_kv_heads: int, num_shards: int) -> int:
    """KV heads in weights and cache over all shards: with more shards than heads, one a shard."""
    return max(num_kv_heads, num_shards)


def check_tensor_parallel_size(
    size: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    vocab_size: int,
    mixtures: Sequence[tuple[int, int]] = (),
) -> None:
    """Raise if a model cannot be cut into ``size`` equal shards.

    Args:
        size: How many.
        num_heads: N.
        num_kv_heads: K.
        intermediate_size: F of layers that serve every token; 0 for none.
        vocab_size: V.
        mixtures: Experts and their F, one of which must divide.

    Raises:
        ValueError: Naming the dimension that does not divide and the sizes that work.
    """
    valid = [
        n
        for n in range(1, num_heads + 1)
        if num_heads % n == 0
        and intermediate_size % n == 0
        and vocab_size % n == 0
        and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
        and all(num_experts % n == 0 or width % n == 0 for num_experts, width in mixtures)
    ]
    if size not in valid:
        experts = "".join(f", {E} experts or their width {F}" for E, F in mixtures)
        raise ValueError(
            f"tensor_parallel_size {size} does not divide num_heads {num_heads}, num_kv_heads "
            f"{num_kv_heads}, intermediate_size {intermediate_size}{experts} and vocab_size "
            f"{vocab_size} evenly: use one of {valid}"
        )
