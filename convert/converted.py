"""The directory that ``convert_checkpoint`` writes, and how it is opened and checked.

    config.json, tokenizer files, generation_config.json    as Hugging Face names them
    parameters/                                             an Orbax checkpoint of the flat tree
    manifest.json                                           every tensor: shape, dtype, bytes

The arrays in ``parameters`` are plain zarr (version 2), uncompressed and in one chunk each. Orbax
restores that; and a chunk is nothing but the array's bytes, so we map it like a safetensors file.
The manifest is written last, and the directory gets its name only after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxengine.convert.checkpoint import Checkpoint, read_json, read_tokenizer_files
from jaxengine.convert.tensors import MappedTensor

MANIFEST = "manifest.json"
PARAMETERS = "parameters"
FORMAT = "jaxengine-converted"
VERSION = 1
INCOMPLETE = ".incomplete-"
REPLACED = ".replaced-"  # the earlier conversion, while a new one takes its place


def chunk_path(array: Path, ndim: int) -> Path:
    """The file with an array's values: zarr names a chunk by its place on each axis, as in 0.0."""
    return array / ".".join("0" * max(ndim, 1))


def is_converted(path: Path) -> bool:
    """Whether the directory is one of ours."""
    return (path / MANIFEST).is_file()


def refuse_interrupted(path: Path) -> None:
    """Explain what lies at or beside the path, if it is the rest of an interrupted conversion.

    Raises:
        ValueError: If it is.
    """
    if (path / PARAMETERS).is_dir() or INCOMPLETE in path.name:
        raise ValueError(f"{path} is an incomplete conversion (no {MANIFEST}): run it again")
    rests = [] if path.exists() else interrupted(path)
    if rests:
        raise ValueError(
            f"{path} was never completed: an interrupted conversion left "
            f"{', '.join(rest.name for rest in rests)} beside it. Run the conversion again"
            f" ({REPLACED}* is an earlier one, complete: rename it to get it back)."
        )


def interrupted(path: Path) -> list[Path]:
    """What killed conversions to ``path`` have left beside it."""
    if not path.parent.is_dir():
        return []
    prefixes = (path.name + INCOMPLETE, path.name + REPLACED)
    return sorted(rest for rest in path.parent.iterdir() if rest.name.startswith(prefixes))


def open_converted(path: Path) -> Checkpoint:
    """Open a converted directory.

    Raises:
        ValueError: If it is incomplete, damaged, or of a later version.
    """
    if INCOMPLETE in path.name:
        refuse_interrupted(path)
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("tensors"), list):
        raise ValueError(f"{path / MANIFEST} is no manifest of a converted checkpoint")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')} of the format, this program reads "
            f"{VERSION}: convert the model again"
        )
    tensors = {entry["name"]: _tensor(path, entry) for entry in manifest["tensors"]}
    generation_config = path / "generation_config.json"
    return Checkpoint(
        source=path,
        format="converted",
        hf_config=read_json(path / "config.json"),
        tensors=tensors,
        tokenizer_files=lambda: read_tokenizer_files(path),
        generation_config=read_json(generation_config) if generation_config.is_file() else {},
    )


def _tensor(path: Path, entry: dict[str, Any]) -> MappedTensor:
    name, shape = entry["name"], tuple(entry["shape"])
    file = chunk_path(path / PARAMETERS / name, len(shape))
    tensor = MappedTensor(name, shape, np.dtype(entry["dtype"]), file, 0)
    if not file.is_file():
        raise ValueError(f"{path} is incomplete: the values of {name!r} are missing ({file})")
    found = file.stat().st_size
    if found != tensor.nbytes:
        raise ValueError(
            f"{path} is damaged: {name!r} of shape {shape} needs {tensor.nbytes} bytes, "
            f"{file} has {found}. Convert the model again."
        )
    return tensor
