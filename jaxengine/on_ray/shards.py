"""Rows of JSONL and Parquet files, numbered in input order and cut into shards of N rows.

No Ray here.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".parquet")
COLUMNS = ("prompt", "messages")

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Piece(NamedTuple):
    """Consecutive rows of one file.

    Attributes:
        start: Where they begin: a byte offset in JSONL, a row number in Parquet.
    """

    path: str
    start: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows that one replica does and stores together.

    Attributes:
        first_row: Number of its first row in the whole source.
    """

    number: int
    first_row: int
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all pieces."""
        return sum(piece.num_rows for piece in self.pieces)

    def to_json(self) -> str:
        """Write it as text."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def from_json(cls, text: str) -> "Shard":
        """Read what ``to_json`` wrote."""
        number, first_row, pieces = json.loads(text)
        return cls(number, first_row, tuple(Piece(*piece) for piece in pieces))

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        """Give (row number, its fields or what is wrong with it)."""
        pieces = (_read_piece(piece) for piece in self.pieces)
        return zip(itertools.count(self.first_row), itertools.chain.from_iterable(pieces))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All rows of a source.

    Attributes:
        fingerprint: One entry a file (name, rows, digest of its content).
    """

    shards: list[Shard]
    fingerprint: list[dict[str, Any]]

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.num_rows for shard in self.shards)


def open_dataset(source: Source, rows_per_shard: int) -> Dataset:
    """Read all files once, and cut their rows into shards.

    Args:
        source: A file, a folder, a pattern such as ``"data/*.jsonl"``, or a list of these.
        rows_per_shard: Rows of each shard but the last.

    Raises:
        ValueError: If there is no row, a file has another format, or a Parquet file no prompts.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}: a positive integer is needed")
    paths = find_files(source)
    cutter = _Cutter(rows_per_shard)
    fingerprint = []
    for path in paths:
        scan = _scan_jsonl if path.suffix == ".jsonl" else _scan_parquet
        first_row = cutter.num_rows
        digest = scan(path, cutter)
        num_rows = cutter.num_rows - first_row
        fingerprint.append({"name": path.name, "num_rows": num_rows, "blake2b": digest})
    if not cutter.shards:
        raise ValueError(f"there is no row in {', '.join(map(str, paths))}")
    shards = [
        Shard(number, number * rows_per_shard, tuple(pieces))
        for number, pieces in enumerate(cutter.shards)
    ]
    return Dataset(shards, fingerprint)


def find_files(source: Source) -> list[Path]:
    """Return the files of a source as absolute paths; those of a folder or pattern by name.

    Raises:
        ValueError: If something names no file, or one that is neither JSONL nor Parquet.
    """
    entries = [source] if isinstance(source, str | os.PathLike) else list(source)
    paths: list[Path] = []
    for entry in (os.fspath(entry) for entry in entries):
        found = [Path(entry)] if Path(entry).is_file() else sorted(_matches(entry))
        if not found:
            raise ValueError(f"{entry} names no file: give JSONL or Parquet files, or their folder")
        paths += found
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is neither a .jsonl nor a .parquet file")
    return [path.absolute() for path in paths]


def _matches(entry: str) -> list[Path]:
    if Path(entry).is_dir():
        return [path for path in Path(entry).iterdir() if path.suffix in SUFFIXES]
    return [Path(name) for name in glob.glob(entry)]


class _Cutter:
    """Takes rows in order; begins a new piece at each shard's first row and each file's."""

    def __init__(self, rows_per_shard: int) -> None:
        self._rows_per_shard = rows_per_shard
        self.num_rows = 0
        self.shards: list[list[Piece]] = []

    @property
    def room(self) -> int:
        """Rows that the newest shard can still take, or a new one."""
        return self._rows_per_shard - self.num_rows % self._rows_per_shard

    def add(self, path: str, start: int, num_rows: int) -> None:
        """Add rows, not more than there is room for, that begin or continue a file's piece."""
        if self.num_rows % self._rows_per_shard == 0:
            self.shards.append([])
        pieces = self.shards[-1]
        if pieces and pieces[-1].path == path:
            pieces[-1] = pieces[-1]._replace(num_rows=pieces[-1].num_rows + num_rows)
        else:
            pieces.append(Piece(path, start, num_rows))
        self.num_rows += num_rows


def _scan_jsonl(path: Path, cutter: _Cutter) -> str:
    """Add the rows of a file, one a line that is not blank; returns its digest."""
    digest, offset, name = hashlib.blake2b(digest_size=16), 0, str(path)
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            if not line.isspace():
                cutter.add(name, offset, 1)
            offset += len(line)
    return digest.hexdigest()


def _scan_parquet(path: Path, cutter: _Cutter) -> str:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    names = metadata.schema.to_arrow_schema().names
    if not set(COLUMNS) & set(names):
        raise ValueError(
            f"{path} has neither a column 'prompt' nor 'messages', only {', '.join(names)}"
        )
    start = 0
    while start < metadata.num_rows:
        num_rows = min(cutter.room, metadata.num_rows - start)
        cutter.add(str(path), start, num_rows)
        start += num_rows
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_piece(piece: Piece) -> Iterator[dict[str, Any] | ValueError]:
    read = _read_jsonl if piece.path.endswith(".jsonl") else _read_parquet
    return itertools.islice(read(piece), piece.num_rows)


def _read_jsonl(piece: Piece) -> Iterator[dict[str, Any] | ValueError]:
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        for line in file:
            if not line.isspace():
                yield _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | ValueError:
    try:
        fields = json.loads(line)
    except ValueError as error:
        return ValueError(f"the line is not JSON: {error}")
    if not isinstance(fields, dict):
        return ValueError(f"the line is not a JSON object: {fields!r:.100}")
    return fields


def _read_parquet(piece: Piece) -> Iterator[dict[str, Any] | ValueError]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(piece.path) as file:
        metadata, first_group, num_before = file.metadata, 0, 0
        while num_before + metadata.row_group(first_group).num_rows <= piece.start:
            num_before += metadata.row_group(first_group).num_rows
            first_group += 1
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        groups = list(range(first_group, metadata.num_row_groups))
        batches = file.iter_batches(batch_size=1024, row_groups=groups, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from itertools.islice(rows, piece.start - num_before, None)
