"""Finds the entries of a ``torch.save`` file's zip, and checks every byte that leads to them.

A zip says everything twice, in the header before each entry and in the directory at its end, and
has a checksum for each entry. A reader that trusts one of the two headers loads other weights when
a bit of it is flipped; so both are compared, entries must lie one behind the other, and each
checksum is computed (at the speed of memory; several entries at a time).
Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxengine.convert.errors import CheckpointError, check_unique, shown
from jaxengine.convert.tensors import file_bytes_of

HAS_DESCRIPTOR = 0x08  # flag: sizes and checksum stand behind the entry too, and may be 0 before
IN_EXTRA_FIELD = 0xFFFFFFFF  # a size of 32 bits that says: the size of 64 bits is elsewhere
CHUNK_BYTES = 16 * 2**20  # a whole storage at once would hold up the other threads' checksums


@dataclass(frozen=True)
class Entry:
    """A stored file of the zip.

    Attributes:
        name: Name in the zip.
        start: Where its content begins, in bytes from the start of the zip.
        size: Bytes of the content.
        crc: Checksum that the zip has for it.
    """

    name: str
    start: int
    size: int
    crc: int


class _Clamped(io.FileIO):
    """A file that allocates no more for a read than it has left."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        super().__init__(path)
        self.file_bytes = file_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self.file_bytes - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left)) or b""


def read_entries(path: Path) -> dict[str, Entry]:
    """Every entry by name, checked.

    Raises:
        CheckpointError: If the zip is truncated, contradicts itself, or fails a checksum.
    """
    file_bytes = file_bytes_of(path)
    infos, directory_start = _directory(path, file_bytes)
    check_unique((info.filename for info in infos), path, "the zip's entry")
    with _mapped(path) as data:
        ends = [info.header_offset for info in infos[1:]] + [directory_start]
        entries = [_entry(path, data, info, end) for info, end in zip(infos, ends, strict=True)]
        _check_sums(path, data, entries)
    return {entry.name: entry for entry in entries}


def content_of(path: Path, entry: Entry) -> bytes:
    """The content of a small entry."""
    with path.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.size)


def _directory(path: Path, file_bytes: int) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries as the directory at the end lists them, by place; and where it starts."""
    try:
        with _Clamped(path, file_bytes) as file, zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            return infos, archive.start_dir
    except (zipfile.BadZipFile, EOFError):
        reason = "truncated, or in torch's format from before 1.6"
    # What zipfile raises for a directory of nonsense.
    except (NotImplementedError, RuntimeError, struct.error, ValueError, OverflowError) as error:
        reason = f"damaged in its zip directory ({str(error)[:80]})"
    raise CheckpointError(f"{path} is {reason}: fetch it again, or use a safetensors checkpoint")


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view


def _entry(path: Path, data: memoryview, info: zipfile.ZipInfo, end: int) -> Entry:
    """An entry whose two headers agree, and whose content fills what lies before ``end``."""
    name = info.orig_filename
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CheckpointError(
            f"{path}: entry {shown(name)} is compressed, which torch never does: use a "
            "safetensors checkpoint"
        )
    start = _check_local_header(path, data, info)
    gap = end - start - info.file_size
    # A descriptor has 3 fields of 4 or 8 bytes, and may have a signature before them.
    possible = (12, 16, 20, 24) if info.flag_bits & HAS_DESCRIPTOR else (0,)
    if gap not in possible:
        raise CheckpointError(
            f"{path}: entry {shown(name)} has {info.file_size} bytes from byte {start} on, the "
            f"next one starts at {end}: the zip is damaged, fetch it again"
        )
    return Entry(name, start, info.file_size, info.CRC)


def _check_local_header(path: Path, data: memoryview, info: zipfile.ZipInfo) -> int:
    """Compare the header before an entry with the directory's; returns where its content starts."""
    name = info.orig_filename
    offset = info.header_offset
    if not 0 <= offset <= len(data) - 30:
        raise CheckpointError(
            f"{path}: entry {shown(name)} starts at byte {offset}, the file has {len(data)}: fetch "
            "it again"
        )
    signature, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = (
        struct.unpack_from("<4sHHHHHIIIHH", data, offset)
    )
    stored_name = bytes(data[offset + 30 : offset + 30 + name_bytes])
    expected = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
    facts = [
        ("signature", signature, b"PK\x03\x04"),
        ("flags", flags, info.flag_bits),
        ("method", method, info.compress_type),
        ("name", stored_name, expected),
    ]
    if not flags & HAS_DESCRIPTOR:
        facts.append(("checksum", crc, info.CRC))
        if size != IN_EXTRA_FIELD:
            facts += [("size", size, info.file_size), ("size", packed, info.compress_size)]
    for what, found, wanted in facts:
        if found != wanted:
            raise CheckpointError(
                f"{path}: the {what} of entry {shown(name)} is {shown(found)} in its header and "
                f"{shown(wanted)} in the zip's directory: the file is damaged, fetch it again"
            )
    return int(offset + 30 + name_bytes + extra_bytes)


def _check_sums(path: Path, data: memoryview, entries: list[Entry]) -> None:
    def crc(entry: Entry) -> int:
        value = 0
        for start in range(entry.start, entry.start + entry.size, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, entry.start + entry.size)
            value = zlib.crc32(data[start:stop], value)
        return value

    with ThreadPoolExecutor() as pool:
        for entry, found in zip(entries, pool.map(crc, entries), strict=True):
            if found != entry.crc:
                raise CheckpointError(
                    f"{path}: the checksum of entry {shown(entry.name)} is {found:#010x}, the zip "
                    f"says {entry.crc:#010x}: the file is damaged (or was saved with "
                    "set_crc32_options(False)). Fetch it again"
                )
