"""Calls kernels for the ops, and knows which have failed to compile here.

A kernel is a function named "module:function": imported when first asked, so that a CPU run never
pays for the Pallas GPU backends. What it does not serve it refuses, by NotImplementedError, and the
op turns to the next. A kernel that serves a shape by its own word and then fails to lower or
compile (another version of jax, another GPU) is found by ``retire_failing_kernels``, and from then
on is refused as well. Nothing of that costs a program that compiles anything.
"""

import functools
import importlib
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)


class _Call(NamedTuple):
    """One kernel with shapes that it was asked for, as it can be lowered alone."""

    name: str  # for people
    function: Callable[..., Any]
    operands: tuple[Any, ...]  # pytrees of ShapeDtypeStruct
    options: dict[str, Any]


_calls: dict[Hashable, _Call] = {}  # by kernel and operands
_causes: dict[Hashable, str] = {}  # of those that have failed
_lock = threading.Lock()


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
            if it has failed with such operands before.
    """
    function = load_function(location)
    arrays, structure = jax.tree.flatten(operands)
    shapes = ", ".join(f"{array.dtype.name}{list(array.shape)}" for array in arrays)
    key = (location, structure, shapes, repr(options))
    if key in _causes:
        raise NotImplementedError(f"it has failed to compile here: {_causes[key]}")
    abstract = structure.unflatten(_abstract(array) for array in arrays)
    name = f"{location.split(':')[1]}({shapes})"
    _calls[key] = _Call(name, function, abstract, options)  # before: tracing it may fail
    try:
        return function(*operands, **options)
    except NotImplementedError:
        _calls.pop(key, None)
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


def num_retired() -> int:
    """Return how many kernels, with their shapes, have failed in this process."""
    return len(_causes)


def retire_failing_kernels(device: jax.Device) -> bool:
    """After a program failed: find the kernels that do not compile, and refuse them from now on.

    Every kernel that programs have asked for is compiled alone. For each that fails there is one
    warning with its name, its shapes and the cause. jax forgets what it has traced, as that holds
    the failing kernels.

    Args:
        device: To compile for.

    Returns:
        Whether there were any: then the program is worth another try.
    """
    with _lock:
        failed = {}
        for key, call in list(_calls.items()):
            cause = _failure(call, device)
            if cause is not None:
                failed[key] = cause
                logger.warning("%s does not compile here and is left out: %s", call.name, cause)
                _calls.pop(key, None)
        _causes.update(failed)
        if failed:
            jax.clear_caches()
        return bool(failed)


def _failure(call: _Call, device: jax.Device) -> str | None:
    try:
        with jax.default_device(device):
            jax.jit(functools.partial(call.function, **call.options)).lower(
                *call.operands
            ).compile()
    except Exception as error:  # whatever a compiler may raise
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
