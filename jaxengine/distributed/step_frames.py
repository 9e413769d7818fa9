"""StepInputs as a frame and back, exactly: what follows from the dataclass, field by field."""

import dataclasses
import functools
import types
import typing
from numbers import Integral
from typing import Any

import numpy as np

from jaxengine.distributed.frames import Frame
from jaxengine.engine.device.step_inputs import StepInputs

STEP = "step"
MASKS = "masks"


def encode_step(inputs: StepInputs, replica: int = 0) -> Frame:
    """Return a step's inputs as a frame.

    Args:
        inputs: From ``ModelRunner.prepare``.
        replica: Whose step it is.
    """
    arrays: list[np.ndarray] = []
    plain = _to_plain(inputs, arrays)
    return Frame(STEP, {"replica": replica, "inputs": plain}, tuple(arrays))


def decode_step(frame: Frame) -> tuple[int, StepInputs]:
    """Return the number of the replica and its step's inputs.

    Raises:
        ValueError: If the frame holds anything else.
    """
    replica = frame.values.get("replica")
    if not isinstance(replica, int):
        raise ValueError(f"a step's frame names replica {replica!r}, not a number")
    return replica, _from_plain(StepInputs, frame.values.get("inputs"), frame.arrays)


def encode_masks(masks: np.ndarray) -> Frame:
    """Return the masks of the step sent last, which follow it once they are known."""
    return Frame(MASKS, {}, (masks,))


def decode_masks(frame: Frame) -> np.ndarray:
    """Return a step's masks.

    Raises:
        ValueError: If the frame holds anything else.
    """
    if frame.kind != MASKS or len(frame.arrays) != 1:
        raise ValueError(f"a frame of kind {frame.kind!r} came where a step's masks were needed")
    return frame.arrays[0]


def _to_plain(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _to_plain(getattr(value, field.name), arrays) for field in fields}
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    raise TypeError(
        f"a step's input is of type {type(value)}: only numbers, names and arrays are sent"
    )


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _from_plain(kind: type[Any], plain: Any, arrays: tuple[np.ndarray, ...]) -> Any:
    """Rebuild a value of the annotated type ``kind``."""
    if isinstance(kind, types.UnionType):  # "X | None"
        if plain is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
    if kind is np.ndarray:
        index = plain.get("array") if isinstance(plain, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(arrays):
            raise ValueError(f"a step's frame has no array {plain!r}")
        return arrays[index]
    if not dataclasses.is_dataclass(kind):
        if type(plain) is not kind:
            raise ValueError(f"a step's frame has {plain!r} where {kind.__name__} is needed")
        return plain
    hints = _hints(kind)
    if not isinstance(plain, dict) or plain.keys() != hints.keys():
        raise ValueError(f"a step's frame does not hold the fields of {kind!r}")
    return kind(**{name: _from_plain(hints[name], plain[name], arrays) for name in hints})
