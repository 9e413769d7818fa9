"""The results of a run: a manifest, and one file a shard that is complete or not there.

No Ray here.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.on_ray.shards import Shard

MANIFEST = "manifest.json"
MAX_SHARDS = 1_000_000  # six digits: the names sort as the numbers do


class ShardCounts(NamedTuple):
    """What a stored shard holds."""

    num_rows: int
    num_errors: int


class OutputDirectory:
    """Files ``part-000000.jsonl``, ...: one row a line, in input order.

    Args:
        path: On a file system that all replicas see.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    def prepare(self, manifest: Mapping[str, Any]) -> None:
        """Begin a run, or check that it is the one begun here before.

        Args:
            manifest: All that decides what the rows will be; JSON values.

        Raises:
            ValueError: If the directory holds another run, or other files.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(manifest))
        stored = self.path / MANIFEST
        if not stored.exists():
            if any(path.name.startswith("part-") for path in self.path.iterdir()):
                raise ValueError(
                    f"{self.path} holds results but no {MANIFEST}: take another output directory"
                )
            _write_atomically(stored, [json.dumps(wanted, indent=2)])
            return
        changes = list(differences(json.loads(stored.read_text(encoding="utf-8")), wanted))
        if changes:
            raise ValueError(
                f"{self.path} holds a run with other parameters: {'; '.join(changes)}. Take "
                "another output directory, or the old parameters to go on with that run"
            )

    def part_path(self, shard_number: int) -> Path:
        """Return where a shard is stored."""
        return self.path / f"part-{shard_number:06d}.jsonl"

    def counts(self, shard: Shard) -> ShardCounts | None:
        """Count the rows of a stored shard; None if it is missing, or has not the rows it must."""
        path = self.part_path(shard.number)
        if not path.exists():
            return None
        with path.open("rb") as file:
            is_error = ["error" in json.loads(line) for line in file]
        return (
            ShardCounts(len(is_error), sum(is_error)) if len(is_error) == shard.num_rows else None
        )

    def write(self, shard_number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Store a shard; its file appears with all rows, or not at all."""
        lines = (json.dumps(row) for row in rows)
        _write_atomically(self.part_path(shard_number), lines)

    def remove_leftovers(self) -> None:
        """Delete what interrupted writers have left."""
        for path in self.path.glob("*.tmp"):
            path.unlink(missing_ok=True)


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Give one sentence for each JSON value that two manifests do not share."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{name}.{key}" if name else key
            yield from differences(old.get(key), new.get(key), place)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            yield from differences(was, now, f"{name}[{index}]")
    elif old != new:
        yield f"{name} was {old!r:.200} and is now {new!r:.200}"


def _write_atomically(path: Path, lines: Iterable[str]) -> None:
    # The name is the writer's own: the replica that did this shard before may still be at it.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
