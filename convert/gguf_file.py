"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

The ``gguf`` package has a reader too. This one is here because that one takes a view per token of
the vocabulary (seconds for 128k tokens), and trusts the sizes that a file declares. Its dequantiser
is used as it is. The checks are those of llama.cpp's reader (ggml/src/gguf.cpp), and more.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from jaxengine.convert.errors import CheckpointError, check_unique, integer, shape_of, shown
from jaxengine.convert.tensors import MappedTensor, StoredTensor, file_bytes_of

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_AXES = 4
MAX_ITEMS = 1 << 24  # of an array in the metadata; the largest vocabulary has 2**18 tokens
MAX_TEXT_BYTES = 1 << 28

# The least bytes that one entry takes: what is left of the file bounds how many there can be.
KEY_BYTES = 8 + 4 + 1
TENSOR_BYTES = 8 + 4 + 4 + 8
TEXT_BYTES = 8

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


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header lists it; ``offset`` counts from where the tensors begin."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def read_gguf(path: Path) -> GGUFFile:
    """Parse the header and check it against the file.

    Raises:
        CheckpointError: If the file is no GGUF file, of a version or type not known, truncated,
            or its header contradicts itself.
    """
    file_bytes = file_bytes_of(path)
    if file_bytes < 24:
        raise CheckpointError(f"{path} is no GGUF file: it has {file_bytes} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read_header(_Header(path, data))


class _Header:
    """A cursor over the bytes of the header, which bounds what is read by what is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file."""
        return len(self.data) - self.position

    def number(self, letter: str, field: str) -> Any:
        size = struct.calcsize("<" + letter)
        if size > self.left:
            raise CheckpointError(
                f"{self.path} is truncated in its header: {field} would end at byte "
                f"{self.position + size}, the file has {len(self.data)}. Fetch it again"
            )
        (value,) = struct.unpack_from("<" + letter, self.data, self.position)
        self.position += size
        return value

    def count(self, letter: str, field: str, limit: int) -> int:
        return integer(self.number(letter, field), self.path, field, 0, limit)

    def text(self, field: str) -> str:
        limit = min(self.left - TEXT_BYTES, MAX_TEXT_BYTES)
        length = self.count("Q", f"the length of {field}", limit)
        start, self.position = self.position, self.position + length
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {field} at byte {start} is no UTF-8 ({error.reason}): the GGUF "
                "header is damaged, fetch it again"
            ) from None

    def texts(self, count: int, field: str) -> list[str]:
        """Several texts: what ``text`` does, without its cost for each of 128,000 tokens."""
        data, end, position = self.data, len(self.data), self.position
        found = []
        for number in range(count):
            start = position + TEXT_BYTES
            position = start + int.from_bytes(data[position:start], "little")
            if start > end or position > end:
                raise CheckpointError(
                    f"{self.path}: {field} has an entry {number} of {position - start} bytes at "
                    f"byte {start}, the file has {end}: it is damaged, fetch it again"
                )
            try:
                found.append(data[start:position].decode())
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{self.path}: {field} has an entry {number} that is no UTF-8 "
                    f"({error.reason}): the file is damaged, fetch it again"
                ) from None
        self.position = position
        return found

    def type(self, field: str) -> GGUFValueType:
        number = self.number("I", f"the type of {field}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: the value of {field} is damaged: its type is {number}, known are 0 "
                f"to {max(GGUFValueType)}"
            ) from None

    def value(self, field: str) -> Any:
        kind = self.type(field)
        if kind == GGUFValueType.ARRAY:
            return self.array(field)
        return self.text(field) if kind == GGUFValueType.STRING else self.scalar(kind, field)

    def scalar(self, kind: GGUFValueType, field: str) -> Any:
        return self.number(SCALARS[kind], field)

    def array(self, field: str) -> list[Any]:
        kind = self.type(field)
        if kind == GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.path}: {field} is an array of arrays: not supported")
        letter = SCALARS.get(kind)
        item_bytes = struct.calcsize("<" + letter) if letter else TEXT_BYTES
        limit = min((self.left - 8) // item_bytes, MAX_ITEMS)
        count = self.count("Q", f"the length of {field}", max(limit, 0))
        if letter is None:
            return self.texts(count, field)
        values = np.frombuffer(self.data, np.dtype(letter).newbyteorder("<"), count, self.position)
        self.position += count * item_bytes
        return list(values.tolist())


def _read_header(header: _Header) -> GGUFFile:
    path = header.path
    if header.data[:4] != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file: it starts with {header.data[:4]!r}")
    header.position = 4
    version = header.number("I", "the version")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF of version {version}, readable are 2 and 3")
    num_tensors = header.number("Q", "the number of tensors")
    num_keys = header.count("Q", "the number of metadata keys", header.left // KEY_BYTES)
    integer(num_tensors, path, "the number of tensors", 0, header.left // TENSOR_BYTES)
    pairs = [_pair(header, number) for number in range(num_keys)]
    check_unique((key for key, _ in pairs), path, "the metadata key")
    entries = [_entry(header, number) for number in range(num_tensors)]
    check_unique((entry.name for entry in entries), path, "tensor")
    metadata = dict(pairs)
    tensors = dict(_tensors(header, entries, _alignment(path, metadata)))
    return GGUFFile(path, metadata, tensors)


def _pair(header: _Header, number: int) -> tuple[str, Any]:
    key = header.text(f"metadata key {number}")
    return key, header.value(f"the metadata key {shown(key)}")


def _entry(header: _Header, number: int) -> _Entry:
    name = header.text(f"the name of tensor {number}")
    what = f"tensor {shown(name)}"
    num_axes = header.count("I", f"the number of axes of {what}", MAX_AXES)
    sizes = [header.number("Q", f"axis {axis} of {what}") for axis in range(num_axes)]
    shape = shape_of(sizes[::-1], header.path, name)
    type_number = header.number("I", f"the type of {what}")
    return _Entry(name, shape, type_number, header.number("Q", f"the offset of {what}"))


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    alignment = integer(value, path, "general.alignment", 1, MAX_ALIGNMENT)
    if alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: general.alignment is {alignment}, it must be a power of two: the file is "
            "damaged, fetch it again"
        )
    return alignment


def _tensors(
    header: _Header, entries: list[_Entry], alignment: int
) -> Iterator[tuple[str, StoredTensor]]:
    """Where each tensor lies: one behind the other, each padded to the alignment."""
    start = _padded(header.position, alignment)
    expected = 0
    for entry in entries:
        if entry.offset != expected:
            raise CheckpointError(
                f"{header.path}: tensor {shown(entry.name)} has offset {entry.offset}, expected "
                f"{expected} behind the one before it: the header is damaged, fetch it again"
            )
        tensor = _tensor(header.path, entry, start + entry.offset)
        end = start + entry.offset + tensor.nbytes
        if end > len(header.data):
            raise CheckpointError(
                f"{header.path} is truncated: tensor {shown(entry.name)} of shape {entry.shape} "
                f"ends at byte {end}, the file has {len(header.data)}. Fetch it again."
            )
        expected = _padded(entry.offset + tensor.nbytes, alignment)
        yield entry.name, tensor
    # Some writers leave out the padding behind the last tensor.
    if entries and start + expected < len(header.data):
        raise CheckpointError(
            f"{header.path}: its tensors end at byte {start + expected}, the file at "
            f"{len(header.data)}: the header is damaged, fetch it again"
        )


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _tensor(path: Path, entry: _Entry, offset: int) -> StoredTensor:
    name, shape = entry.name, entry.shape
    try:
        kind = GGMLQuantizationType(entry.type_number)
    except ValueError:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has the unknown type {entry.type_number}"
        ) from None
    if kind in PLAIN:
        return MappedTensor(name, shape, PLAIN[kind], path, offset)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if not _is_known(kind):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} is of type {kind.name}, not dequantised here"
        )
    if not shape or shape[-1] % per_block:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {shape} has rows that are no multiple of the "
            f"{per_block} values in a block of {kind.name}"
        )
    in_bytes = (*shape[:-1], shape[-1] // per_block * block_bytes)
    blocks = MappedTensor(name, in_bytes, np.dtype(np.uint8), path, offset)
    return QuantisedTensor(name, shape, kind, blocks)


@functools.cache
def _is_known(kind: GGMLQuantizationType) -> bool:
    """Whether ``gguf`` dequantises the type: it only says so when asked for values."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
