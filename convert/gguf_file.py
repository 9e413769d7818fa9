"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

The ``gguf`` package has a reader too. This one is here because that one takes a view per token of
the vocabulary (seconds for 128k tokens), and on a truncated file fails in a reshape that names
neither file nor tensor. Its dequantiser is used as it is.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from jaxengine.convert.tensors import MappedTensor, StoredTensor

DEFAULT_ALIGNMENT = 32

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype("bfloat16"),
}


@dataclass(frozen=True)
class QuantisedTensor:
    """Blocks of a quantised type in a file; dequantised to float32 row by row.

    Attributes:
        blocks: The same tensor as bytes: its rows hold whole blocks.
    """

    name: str
    shape: tuple[int, ...]
    quantisation: GGMLQuantizationType
    blocks: MappedTensor

    @property
    def dtype(self) -> np.dtype:
        """Dtype after dequantising."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.blocks.nbytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, dequantised."""
        if start == stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return np.asarray(dequantize(self.blocks.rows(start, stop), self.quantisation))


@dataclass(frozen=True)
class GGUFFile:
    """What the header says.

    Attributes:
        metadata: Every key with its value as a plain Python value.
        tensors: Every tensor by its GGUF name, outermost axis first.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Parse the header and check it against the file.

    Raises:
        ValueError: If the file is no GGUF file, of a version or type not known, or truncated.
    """
    if path.stat().st_size < 24:
        raise ValueError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        try:
            return _read_header(path, header, len(data))
        except struct.error:
            raise ValueError(f"{path} is truncated in its header: fetch it again") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: the GGUF header is damaged ({error})") from None


class _Header:
    """A cursor over the bytes of the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + letter)
        if count > (len(self.data) - self.position) // size:
            raise struct.error("past the end of the file")
        values = struct.unpack_from(f"<{count}{letter}", self.data, self.position)
        self.position += count * size
        return values

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.position:
            raise struct.error("past the end of the file")
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].decode("utf-8")

    def value(self, type_number: int) -> Any:
        kind = GGUFValueType(type_number)
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        if GGUFValueType(item) in SCALARS:
            return list(self.numbers(SCALARS[GGUFValueType(item)], count))
        return [self.value(item) for _ in range(count)]


def _read_header(path: Path, header: _Header, file_bytes: int) -> GGUFFile:
    if header.data[:4] != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it starts with {header.data[:4]!r}")
    header.position = 4
    version = header.number("I")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF of version {version}, readable are 2 and 3")
    num_tensors, num_keys = header.numbers("Q", 2)
    metadata = {}
    for _ in range(num_keys):
        key = header.text()
        try:
            metadata[key] = header.value(header.number("I"))
        except ValueError as error:
            raise ValueError(f"{path}: the value of {key!r} is damaged ({error})") from None
    entries = []
    for _ in range(num_tensors):
        name = header.text()
        shape = tuple(reversed(header.numbers("Q", header.number("I"))))
        entries.append((name, shape, header.number("I"), header.number("Q")))
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    start = -(-header.position // alignment) * alignment
    tensors = {
        name: _tensor(path, name, shape, number, start + offset, file_bytes)
        for name, shape, number, offset in entries
    }
    return GGUFFile(path, metadata, tensors)


def _tensor(
    path: Path, name: str, shape: tuple[int, ...], number: int, offset: int, file_bytes: int
) -> StoredTensor:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{path}: tensor {name!r} has the unknown type {number}") from None
    if kind in PLAIN:
        tensor: StoredTensor = MappedTensor(name, shape, PLAIN[kind], path, offset)
    else:
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if not _is_known(kind):
            raise ValueError(
                f"{path}: tensor {name!r} is of type {kind.name}, not dequantised here"
            )
        if shape[-1] % per_block:
            raise ValueError(
                f"{path}: tensor {name!r} of shape {shape} has rows that are no multiple of the "
                f"{per_block} values in a block of {kind.name}"
            )
        in_bytes = (*shape[:-1], shape[-1] // per_block * block_bytes)
        blocks = MappedTensor(name, in_bytes, np.dtype(np.uint8), path, offset)
        tensor = QuantisedTensor(name, shape, kind, blocks)
    if offset + tensor.nbytes > file_bytes:
        raise ValueError(
            f"{path} is truncated: tensor {name!r} of shape {shape} ends at byte "
            f"{offset + tensor.nbytes}, the file has {file_bytes}. Fetch it again."
        )
    return tensor


@functools.cache
def _is_known(kind: GGMLQuantizationType) -> bool:
    """Whether ``gguf`` dequantises the type: it only says so when asked for values."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
