"""Reads a SentencePiece model (tokenizer.model): its pieces, and how a text becomes them.

The file is one protocol buffer message. The few fields that matter are read from the wire format,
each held to its type; others are skipped.
Source: sentencepiece_model.proto of google/sentencepiece, and the encoding of protocol buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxengine.convert.errors import CheckpointError

# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
MAX_PIECE_LENGTH = 1024  # characters; known pieces have some tens

Value = int | bytes | memoryview


@dataclass(frozen=True)
class Piece:
    """A token: its text, its rank (the higher, the sooner it is built), and its type."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A tokenizer.model.

    Attributes:
        pieces: By id.
        kind: UNIGRAM or BPE.
        charsmap: Precompiled normalisation; empty for none.
        adds_space: Whether a text gets a space in front.
        joins_spaces: Whether several spaces count as one.
        unk_id: Of what no piece covers.
        bos_id: Of the beginning of a text; -1 for none.
        eos_id: Of its end; -1 for none.
    """

    pieces: tuple[Piece, ...]
    kind: int
    charsmap: bytes
    adds_space: bool
    joins_spaces: bool
    unk_id: int
    bos_id: int
    eos_id: int


def read_sentencepiece(content: bytes, path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Args:
        content: Of the file.
        path: The file, for messages.

    Raises:
        CheckpointError: If it is none, damaged, or of a kind that is not known.
    """
    try:
        model = _model(memoryview(content))
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"{path} is no SentencePiece model ({error}): pass tokenizer= a directory that has "
            "tokenizer.json"
        ) from None
    if model.kind not in (UNIGRAM, BPE):
        raise CheckpointError(
            f"{path}: the SentencePiece model is of type {model.kind}, supported are 1 (unigram) "
            "and 2 (BPE). Pass tokenizer= a directory that has tokenizer.json"
        )
    return model


def _model(content: memoryview) -> SentencePieceModel:
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(dict(_fields(_message(value)))))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=_integer(trainer, 3, UNIGRAM),
        charsmap=bytes(_message(normalizer.get(2, b""))),
        adds_space=bool(_integer(normalizer, 3, 1)),
        joins_spaces=bool(_integer(normalizer, 4, 1)),
        unk_id=_integer(trainer, 40, 0),
        bos_id=_integer(trainer, 41, 1),
        eos_id=_integer(trainer, 42, 2),
    )


def _piece(fields: dict[int, Value]) -> Piece:
    text = bytes(_message(fields.get(1, b""))).decode()
    if len(text) > MAX_PIECE_LENGTH:
        raise ValueError(f"a piece has {len(text)} characters, at most {MAX_PIECE_LENGTH} do")
    (score,) = struct.unpack("<f", _message(fields.get(2, b"\0\0\0\0")))
    return Piece(text, score, _integer(fields, 3, NORMAL))


def _fields(content: memoryview) -> Iterator[tuple[int, Value]]:
    """Numbers and values of a message's fields: integers, or the bytes of all else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"byte {at} has wire type {wire_type}")
        size, at = _varint(content, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
        if size > len(content) - at:
            raise ValueError(
                f"byte {at} begins a field of {size} bytes, {len(content) - at} follow"
            )
        yield number, content[at : at + size]
        at += size


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} ends no integer")


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field is an integer where it should be bytes")
    return memoryview(value)


def _integer(fields: dict[int, Value], number: int, default: int) -> int:
    """A signed 32-bit integer; a negative one is written with 64 bits."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is bytes where it should be an integer")
    return value - (1 << 64) if value >= 1 << 63 else value
