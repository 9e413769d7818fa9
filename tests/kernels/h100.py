"""H100s that are not there: enough of them to lower programs for CUDA."""

from collections.abc import Callable
from typing import Any

import jax


def h100s(count: int = 1, axis: str = "x") -> jax.sharding.AbstractMesh:
    """Return a mesh of so many."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    return jax.sharding.AbstractMesh((count,), (axis,), abstract_device=device)


def lower_for_cuda(
    function: Callable[..., Any], *arguments: Any, mesh: jax.sharding.AbstractMesh | None = None
) -> str:
    """Return a function's program for one H100, or those of a mesh, as text.

    Args:
        function: Jitted (donations are kept) or not.
        arguments: Shapes.
        mesh: From ``h100s``.
    """
    with jax.sharding.use_abstract_mesh(mesh or h100s()):
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        return str(jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text())
