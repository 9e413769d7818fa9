"""How a module declares a weight."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P


def parameter(
    shape: tuple[int, ...],
    dtype: Any,
    spec: P,
    *,
    init: str = "normal",
    num_in_axes: int = 0,
    num_kv_heads: int | None = None,
) -> nnx.Param:
    """Declare a weight.

    Models are only ever built under ``nnx.eval_shape``: the zeros are never made.

    Args:
        shape: Shape in memory.
        dtype: Type in memory.
        spec: How it is cut.
        init: What a dummy one holds: "normal", "ones" or "zeros".
        num_in_axes: Axes that stand first here and last in a checkpoint (see ``Linear``).
        num_kv_heads: KV heads that a checkpoint has of a fused [K, G + 2, ...], where it is held
            with more: each is then repeated, with its share of the queries. None for all else.
    """
    return nnx.Param(
        jnp.zeros(shape, dtype),
        spec=spec,
        init=init,
        num_in_axes=num_in_axes,
        num_kv_heads=num_kv_heads,
    )
