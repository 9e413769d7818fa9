"""What an engine changes in the process around it, before jax is first used.

All of it serves every engine of the process; what the user has chosen already stays.
"""

import os
from pathlib import Path

import jax

from jaxengine.config import EngineConfig
from jaxengine.engine.device.memory import DRIVER_FRACTION


def prepare_process(config: EngineConfig) -> None:
    """Set what XLA takes of the GPU's memory, and where compiled programs are kept."""
    reserve_pool(config.gpu_memory_utilization)
    use_compilation_cache()


def check_devices() -> None:
    """Start jax's backend, so that what is wrong with it is said before a model is fetched.

    Raises:
        ValueError: If the platform that is asked for has no device.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where its plugin is not installed
        wanted = os.environ.get("JAX_PLATFORMS") or jax.config.values.get("jax_platforms")
        reason = " ".join(str(error).split())[:300] or "its plugin is not installed"
        raise ValueError(
            f"jax finds no device (JAX_PLATFORMS={wanted or 'unset'}): {reason}. Set "
            "JAX_PLATFORMS=cpu to run on the CPU, or see that the driver and the jax plugin for "
            "its CUDA release are installed (jaxengine collect-env shows both)"
        ) from error


def reserve_pool(gpu_memory_utilization: float) -> None:
    """Let XLA's allocator take the engine's share at once, unless the user has said otherwise.

    Works only before jax has touched the GPU; later, what the pool got then is the limit.
    """
    fraction = gpu_memory_utilization - DRIVER_FRACTION
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.4f}")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxengine" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
