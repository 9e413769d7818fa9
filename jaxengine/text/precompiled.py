"""Checks the normaliser of SentencePiece inside a tokenizer.json before anything runs it.

It is a binary table: a trie as a double array, whose units point at each other, and texts that
the leaves point at. The library that reads it follows every pointer, and panics where one leads
outside; so all that can be reached is walked here first.
Source of the layout: Darts-clone, and SentencePiece's normalizer.cc.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 16 * 2**20  # SentencePiece's largest table has a quarter of a MiB
BASES_AT_A_TIME = 4096  # each is followed by every label
_LABELS = np.arange(1, 256, dtype=np.int64)  # a key ends at byte 0


def check_tokenizer_json(path: Path) -> None:
    """Check the file's precompiled normalisers; a file without one, or no file, passes.

    Raises:
        ValueError: If the file is no JSON in UTF-8, or a normaliser points outside itself.
    """
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({str(error)[:200]}): fetch it again") from None
    if isinstance(content, dict):
        for charsmap in _charsmaps(content.get("normalizer")):
            check_charsmap(charsmap, path)


def is_panic(error: BaseException) -> bool:
    """Whether an error is a failed assertion of the Rust library: it is no ``Exception``."""
    return type(error).__name__ == "PanicException"


def _charsmaps(normalizer: Any) -> Iterator[Any]:
    if not isinstance(normalizer, dict):
        return
    if normalizer.get("type") == "Precompiled" or "precompiled_charsmap" in normalizer:
        yield normalizer.get("precompiled_charsmap")
    steps = normalizer.get("normalizers")
    for step in steps if isinstance(steps, list) else ():
        yield from _charsmaps(step)


def check_charsmap(text: Any, path: Path) -> None:
    """Walk one table.

    Args:
        text: The table in base64: four bytes of the trie's size, the trie, the texts.
        path: The file, for the message.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError(f"{path}: precompiled_charsmap is no base64: fetch it again") from None
    size = int.from_bytes(content[:4], "little")
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{path}: precompiled_charsmap has {len(content)} bytes, possible are {MAX_BYTES}"
        )
    if len(content) < 4 or size % 4 or not 4 <= size <= len(content) - 4:
        raise ValueError(
            f"{path}: precompiled_charsmap has a trie of {size} bytes, {max(len(content) - 4, 0)} "
            "bytes are there: fetch it again"
        )
    units = np.frombuffer(content, "<u4", size // 4, 4).astype(np.int64)
    texts = content[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: precompiled_charsmap holds a text that is no UTF-8 ({error.reason}): fetch "
            "it again"
        ) from None
    _check_trie(units, texts, path)


def _check_trie(units: np.ndarray, texts: bytes, path: Path) -> None:
    starts = np.ones(len(texts) + 1, bool)  # where a character starts, and the end
    starts[:-1] = np.frombuffer(texts, np.uint8) & 0xC0 != 0x80
    is_seen = np.zeros(len(units), bool)
    waiting = [_offsets(units[:1])]
    while waiting:
        bases, rest = waiting[-1][:BASES_AT_A_TIME], waiting.pop()[BASES_AT_A_TIME:]
        if rest.size:
            waiting.append(rest)
        places = bases[:, None] ^ _LABELS
        _check_places(places, units, path)
        found = np.unique(places[(units[places] & 0x800000FF) == _LABELS])
        found = found[~is_seen[found]]
        is_seen[found] = True
        bases = found ^ _offsets(units[found])
        leaves = bases[(units[found] >> 8) & 1 == 1]
        _check_places(leaves, units, path)
        values = units[leaves] & 0x7FFFFFFF
        if (values > len(texts)).any() or not starts[values].all():
            raise ValueError(
                f"{path}: precompiled_charsmap points outside its texts of {len(texts)} bytes, or "
                "into a character: fetch it again"
            )
        if bases.size:
            waiting.append(bases)


def _offsets(units: np.ndarray) -> np.ndarray:
    return (units >> 10) << ((units & (1 << 9)) >> 6)


def _check_places(places: np.ndarray, units: np.ndarray, path: Path) -> None:
    if places.size and places.max() >= len(units):
        raise ValueError(
            f"{path}: precompiled_charsmap points at unit {places.max()} of {len(units)}: fetch it "
            "again"
        )
