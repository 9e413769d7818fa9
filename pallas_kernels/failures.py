"""Kernels that do not compile though they say they serve: found, named once, and then left out.

Another version of jax, or a GPU that nobody has tried, may refuse a kernel when a program is
lowered or compiled, long after an op has chosen it. So what ops have chosen is kept here; when a
program fails, each of those is compiled alone, and whoever fails too is refused from then on.
Nothing of that costs a program that compiles anything but a line in a dictionary.
"""

import functools
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import jax

logger = logging.getLogger(__name__)
Made = TypeVar("Made")


class KernelCall(NamedTuple):
    """A kernel and what it was asked for, as it can be lowered alone."""

    name: str  # with the shapes, for people
    function: Callable[..., Any]
    operands: tuple[Any, ...]  # pytrees of ShapeDtypeStruct
    options: dict[str, Any]


_calls: dict[Hashable, KernelCall] = {}
_causes: dict[Hashable, str] = {}  # of those that have failed
_lock = threading.Lock()


def note_call(key: Hashable, call: KernelCall) -> None:
    """Remember that a program has asked for a kernel.

    Raises:
        NotImplementedError: If it has failed before.
    """
    if key in _causes:
        raise NotImplementedError(f"{call.name} has failed to compile here: {_causes[key]}")
    _calls[key] = call


def forget_call(key: Hashable) -> None:
    """The kernel has refused: it is in no program."""
    _calls.pop(key, None)


def forget_all() -> None:
    """Ask every kernel again, as a new process does."""
    _calls.clear()
    _causes.clear()


def num_retired() -> int:
    """Return how many kernels, with their shapes, have failed in this process."""
    return len(_causes)


def without_failing_kernels(
    make: Callable[[], Made], device: jax.Device, since: int | None = None
) -> Made:
    """Make a program; if that fails because of a kernel, make it again without the kernel.

    Args:
        make: Lowers or compiles a program, from the start if it is called again.
        device: To compile for.
        since: What ``num_retired`` was when that began; None for now. If another thread has found
            failing kernels meanwhile, that is reason enough to try again.

    Raises:
        Exception: Whatever ``make`` raises, if no kernel is the cause.
    """
    since = num_retired() if since is None else since
    while True:
        try:
            return make()
        except Exception:
            if not retire_failing_kernels(device) and num_retired() == since:
                raise
            since = num_retired()


def retire_failing_kernels(device: jax.Device) -> bool:
    """Find the kernels that do not compile, and refuse them from now on.

    For each there is one warning with its name, its shapes and the cause. jax forgets what it has
    traced, as that holds the failing kernels.

    Args:
        device: To compile for.

    Returns:
        Whether there were any.
    """
    with _lock:
        failed = {}
        for key, call in list(_calls.items()):
            cause = _failure(call, device)
            if cause is not None:
                logger.warning("%s does not compile here and is left out: %s", call.name, cause)
                failed[key] = cause
                _calls.pop(key, None)
        _causes.update(failed)
        if failed:
            jax.clear_caches()
        return bool(failed)


def _failure(call: KernelCall, device: jax.Device) -> str | None:
    try:
        with jax.default_device(device):
            kernel = functools.partial(call.function, **call.options)
            jax.jit(kernel).lower(*call.operands).compile()
    except Exception as error:  # whatever a compiler may raise
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None
