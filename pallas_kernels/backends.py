"""Calls kernels for the ops.

A kernel is a function named "module:function", imported when first asked, so that a CPU run never
pays for the Pallas GPU backends. What it does not serve it refuses by NotImplementedError, with the
reason, and the op turns to the next.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxengine.pallas_kernels.failures import KernelCall, forget_call, note_call


def load_function(location: str) -> Callable[..., Any]:
    """Import a "module:function"; NotImplementedError if this jax cannot."""
    module, function = location.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise NotImplementedError(f"{module} cannot be imported here: {error}") from error


def call_kernel(location: str, *operands: Any, **options: Any) -> Any:
    """Call a kernel's function, while a program is traced.

    Args:
        location: "module:function".
        *operands: Arrays and pytrees of arrays.
        **options: What is fixed at compile time.

    Raises:
        NotImplementedError: If this jax has no such kernel, if it does not serve the operands, or
            if it has failed to compile with such operands.
    """
    function = load_function(location)
    arrays: list[Any]
    structure: Any
    arrays, structure = jax.tree.flatten(operands)
    shapes = ", ".join(f"{array.dtype.name}{list(array.shape)}" for array in arrays)
    abstract = structure.unflatten(
        jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays
    )
    key = (location, structure, shapes, repr(options))
    name = f"{location.split(':')[1]}({shapes})"
    note_call(key, KernelCall(name, function, abstract, options))  # before: tracing it may fail
    try:
        return function(*operands, **options)
    except NotImplementedError:
        forget_call(key)
        raise


def first_that_serves(
    locations: dict[str, str], order: Sequence[str], *operands: Any, **options: Any
) -> Any:
    """Call the first kernel of an order that serves the operands.

    Raises:
        NotImplementedError: If none does, with the reason of each.
    """
    refusals = []
    for name in order:
        try:
            return call_kernel(locations[name], *operands, **options)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("; ".join(refusals))
