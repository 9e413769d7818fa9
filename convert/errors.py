"""The error of every reader: a checkpoint's file is broken, hostile, or not what it says it is.

A file is data from outside. Each number in it that decides how much is read, allocated or looped
over is first held against what the file can hold; what does not fit is reported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_SHOWN = 80  # characters of a value in a message

# Axes of a tensor: what numpy takes is 64, what any published model has is 5.
MAX_AXES = 16
MAX_ELEMENTS = 1 << 48


class CheckpointError(ValueError):
    """A file of a checkpoint cannot be used; the text names file, field, value and limit."""


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is, and never an error of its own."""
    # A damaged file may hold a number of a million digits or lists nested a million deep.
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict | set) and len(value) > MAX_AXES:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def integer(value: Any, path: Path, field: str, low: int, high: int) -> int:
    """Check an integer that a file declares.

    Args:
        value: What the file holds.
        path: The file, for the message.
        field: What the value is called, for the message.
        low: Least value that makes sense.
        high: Largest value that makes sense, such as what the file's length leaves room for.

    Raises:
        CheckpointError: If it is no integer, or outside the bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(
            f"{path}: {field} is {shown(value)}, possible is an integer between {low} and {high}: "
            "the file is damaged, fetch it again"
        )
    return value


def shape_of(sizes: Any, path: Path, name: str) -> tuple[int, ...]:
    """Check the sizes that a file declares for a tensor's axes.

    Args:
        sizes: What the file holds: a list or tuple of integers.
        path: The file, for the message.
        name: The tensor, for the message.

    Returns:
        The shape. Its product is below 2**48, also without the axes of size 0.

    Raises:
        CheckpointError: If there are too many axes, or one is negative, no integer or too large.
    """
    if not isinstance(sizes, list | tuple) or len(sizes) > MAX_AXES:
        what = f"{len(sizes)} axes" if isinstance(sizes, list | tuple) else shown(sizes)
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has a shape of {what}, possible is a list of at most "
            f"{MAX_AXES} sizes: the file is damaged, fetch it again"
        )
    shape = tuple(
        integer(size, path, f"axis {axis} of tensor {shown(name)}", 0, MAX_ELEMENTS)
        for axis, size in enumerate(sizes)
    )
    if math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {shape} has more than {MAX_ELEMENTS} elements: "
            "the file is damaged, fetch it again"
        )
    return shape


def check_unique(names: Iterable[str], path: Path, what: str) -> None:
    """Refuse a name that is there twice: which of the two counts would be a guess.

    Raises:
        CheckpointError: Naming the first.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"{path}: {what} {shown(name)} is there twice: fetch it again")
        seen.add(name)
