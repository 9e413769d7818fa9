"""Frames: what one process tells another, as bytes. Numbers, text and arrays; never objects.

A frame is two lengths, a JSON header and the raw bytes of the arrays. Nothing in it is executed,
so the worst that a wrong one can do is to be refused.
"""

import dataclasses
import json
import math
import struct
from typing import Any

import numpy as np

PREFIX = struct.Struct(">IQ")  # bytes of the header, bytes of the arrays
MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 30  # a step's penalties over very long histories are the largest
DTYPES = ("int32", "float32")


@dataclasses.dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        kind: What it is about.
        values: Anything that JSON can hold.
        arrays: Of int32 or float32.
    """

    kind: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: tuple[np.ndarray, ...] = ()


def encode(frame: Frame) -> bytes:
    """Return a frame as bytes.

    Raises:
        ValueError: If it is too large, or an array is of another type.
    """
    for array in frame.arrays:
        if array.dtype.name not in DTYPES:
            raise ValueError(f"a frame holds arrays of {' or '.join(DTYPES)}, not {array.dtype}")
    layout = [[array.dtype.name, list(array.shape)] for array in frame.arrays]
    header = json.dumps({"kind": frame.kind, "values": frame.values, "arrays": layout}).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in frame.arrays)
    return PREFIX.pack(*check_lengths(len(header), len(body))) + header + body


def check_lengths(num_header: int, num_body: int) -> tuple[int, int]:
    """Return the lengths of a frame's two parts.

    Raises:
        ValueError: If one is more than any frame may have.
    """
    if num_header > MAX_HEADER_BYTES or num_body > MAX_ARRAY_BYTES:
        raise ValueError(
            f"a frame of {num_header} + {num_body} bytes is more than the {MAX_HEADER_BYTES} + "
            f"{MAX_ARRAY_BYTES} allowed"
        )
    return num_header, num_body


def decode(header: bytes, body: bytes) -> Frame:
    """Return the frame of a header and the arrays' bytes.

    Raises:
        ValueError: If they do not fit together.
    """
    match json.loads(header):
        case {"kind": str(kind), "values": dict(values), "arrays": list(layout)}:
            pass
        case _:
            raise ValueError("a frame's header lacks kind, values or arrays")
    arrays, start = [], 0
    for dtype, shape in map(_array_layout, layout):
        count = math.prod(shape)
        end = start + count * np.dtype(dtype).itemsize
        if end > len(body):
            raise ValueError(f"a frame's arrays need {end} bytes, it has {len(body)}")
        arrays.append(np.frombuffer(body, dtype, count, start).reshape(shape))
        start = end
    if start != len(body):
        raise ValueError(f"a frame has {len(body)} bytes of arrays and names {start}")
    return Frame(kind, values, tuple(arrays))


def _array_layout(layout: Any) -> tuple[str, list[int]]:
    match layout:
        case [str(dtype), list(shape)] if dtype in DTYPES:
            if all(isinstance(size, int) and size >= 0 for size in shape):
                return dtype, shape
    raise ValueError(f"a frame's array is described as {layout!r:.80}")
