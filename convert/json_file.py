"""Reads JSON that somebody else wrote: size and nesting are bounded, errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxengine.convert.errors import CheckpointError

# Indices of the largest models have some MB, tokenizers of the largest vocabularies some tens.
MAX_BYTES = 512 * 2**20
MAX_DEPTH = 64  # of any config: 5; of a tokenizer: 8

LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: If the file is not there, is not JSON, is nested too deep, or does not
            hold an object.
    """
    return parse_object(read_small_file(path), path)


def read_small_file(path: Path) -> bytes:
    """The content of a file that is no weights.

    Raises:
        CheckpointError: If it is missing, cannot be read, or is too large for what it is.
    """
    try:
        found = path.stat().st_size
        if found > MAX_BYTES:
            raise CheckpointError(
                f"{path} has {found} bytes, at most {MAX_BYTES} are read: it is damaged"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from bytes; ``path`` is what an error names.

    Raises:
        CheckpointError: As for ``read_json``.
    """
    value = parse(content, path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def parse(content: bytes, path: Path, pairs_hook: Any = None) -> Any:
    """A JSON value from bytes in UTF-8.

    Args:
        content: The text.
        path: What an error names.
        pairs_hook: As ``json.loads`` takes it, to see keys that are there twice.

    Raises:
        CheckpointError: If it is not valid, or nested deeper than ``MAX_DEPTH``.
    """
    if content.startswith(LFS_POINTER):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=pairs_hook)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(_too_deep(path)) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({str(error)[:200]}): fetch it again"
        ) from None
    _check_depth(value, path)
    return value


def _check_depth(value: Any, path: Path) -> None:
    """Refuse what a later ``repr`` or copy would have to recurse into too deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = []
        for each in containers:
            level.extend(each.values() if isinstance(each, dict) else each)
        if not level:
            return
    raise CheckpointError(_too_deep(path))


def _too_deep(path: Path) -> str:
    return f"{path} nests JSON values deeper than {MAX_DEPTH} levels: it is damaged"
