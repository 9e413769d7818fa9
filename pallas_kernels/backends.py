"""What an op asks before it takes a backend: is it there, and is the GPU one for it."""

import importlib
from collections.abc import Callable

import jax

HOPPER_NAMES = ("H100", "H200", "H800", "GH200")


def load_function(location: str) -> Callable[..., jax.Array]:
    """Import a "module:function"; NotImplementedError if this jax cannot."""
    module, function = location.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise NotImplementedError(f"{module} cannot be imported here: {error}") from error


def is_hopper() -> bool:
    """Whether the GPU that runs has Hopper's matrix units, which Mosaic's kernels are for."""
    return any(name in jax.devices()[0].device_kind for name in HOPPER_NAMES)
