"""The directory that ``convert_checkpoint`` writes, and how it is opened and checked.

    config.json, tokenizer files, generation_config.json    as Hugging Face names them
    parameters/                                             an Orbax checkpoint of the flat tree
    manifest.json                                           every tensor: shape, dtype, bytes

The arrays in ``parameters`` are plain zarr (version 2), uncompressed and in one chunk each. Orbax
restores that; and a chunk is nothing but the array's bytes, so we map it like a safetensors file.
The manifest is written last, and the directory gets its name only after it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxengine.convert.checkpoint import (
    Checkpoint,
    config_of,
    read_generation_config,
    read_tokenizer_files,
)
from jaxengine.convert.errors import CheckpointError, check_unique, integer, shape_of, shown
from jaxengine.convert.json_file import read_json
from jaxengine.convert.tensors import MappedTensor

MANIFEST = "manifest.json"
PARAMETERS = "parameters"
FORMAT = "jaxengine-converted"
VERSION = 1
INCOMPLETE = ".incomplete-"
REPLACED = ".replaced-"  # the earlier conversion, while a new one takes its place

NAME = re.compile(r"\w{1,64}(\.\w{1,64}){0,16}", re.ASCII)  # a path in our tree, and no other one
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
DTYPES = {
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", *_FLOAT8)},
    **{
        name: np.dtype(name)
        for name in (
            *("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64"),
            *("uint32", "uint16", "uint8", "bool"),
        )
    },
}


def chunk_path(array: Path, ndim: int) -> Path:
    """The file with an array's values: zarr names a chunk by its place on each axis, as in 0.0."""
    return array / ".".join("0" * max(ndim, 1))


def zarr_metadata(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """What an array's .zarray says.

    Source: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html; for bfloat16 and the 8-bit
    floats, which it does not know, TensorStore's zarr driver.
    """
    has_letters = dtype.kind in "fiub" and dtype.str[1] != "V"
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(shape),
        "dtype": dtype.str if has_letters else dtype.name,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }


def is_converted(path: Path) -> bool:
    """Whether the directory is one of ours."""
    return (path / MANIFEST).is_file()


def refuse_interrupted(path: Path) -> None:
    """Explain what lies at or beside the path, if it is the rest of an interrupted conversion.

    Raises:
        CheckpointError: If it is.
    """
    if (path / PARAMETERS).is_dir() or INCOMPLETE in path.name:
        raise CheckpointError(f"{path} is an incomplete conversion (no {MANIFEST}): run it again")
    rests = [] if path.exists() else interrupted(path)
    if rests:
        raise CheckpointError(
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
        CheckpointError: If it is incomplete, damaged, or of a later version.
    """
    if INCOMPLETE in path.name:
        refuse_interrupted(path)
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("tensors"), list):
        raise CheckpointError(f"{path / MANIFEST} is no manifest of a converted checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {shown(manifest.get('version'))} of the format, this program "
            f"reads {VERSION}: convert the model again"
        )
    tensors = [_tensor(path, entry) for entry in manifest["tensors"]]
    check_unique((tensor.name for tensor in tensors), path / MANIFEST, "tensor")
    return Checkpoint(
        source=path,
        format="converted",
        hf_config=config_of(path),
        tensors={tensor.name: tensor for tensor in tensors},
        tokenizer_files=lambda: read_tokenizer_files(path),
        generation_config=read_generation_config(path),
    )


def _tensor(path: Path, entry: Any) -> MappedTensor:
    name, shape, dtype = _declared(path / MANIFEST, entry)
    array = path / PARAMETERS / name
    file = chunk_path(array, len(shape))
    if not file.is_file():
        raise CheckpointError(f"{path} is incomplete: the values of {name!r} are missing ({file})")
    tensor = MappedTensor(name, shape, dtype, file, 0)
    found = file.stat().st_size
    if found != tensor.nbytes:
        raise CheckpointError(
            f"{path} is damaged: {name!r} of shape {shape} needs {tensor.nbytes} bytes, "
            f"{file} has {found}. Convert the model again."
        )
    _check_array_metadata(array / ".zarray", zarr_metadata(shape, dtype))
    return tensor


def _declared(manifest: Path, entry: Any) -> tuple[str, tuple[int, ...], np.dtype]:
    """Name, shape and dtype as the manifest has them."""
    if not isinstance(entry, dict) or not {"name", "shape", "dtype", "nbytes"} <= entry.keys():
        raise CheckpointError(f"{manifest} has a damaged entry: {shown(entry)}")
    name, dtype_name = entry["name"], entry["dtype"]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CheckpointError(f"{manifest} has the tensor name {shown(name)}: it is damaged")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{manifest}: tensor {name!r} has dtype {shown(dtype_name)}, known: {', '.join(DTYPES)}"
        )
    shape, dtype = shape_of(entry["shape"], manifest, name), DTYPES[dtype_name]
    num_bytes = math.prod(shape) * dtype.itemsize
    integer(entry["nbytes"], manifest, f"the size of tensor {name!r}", num_bytes, num_bytes)
    return name, shape, dtype


def _check_array_metadata(file: Path, expected: dict[str, Any]) -> None:
    """Compare what Orbax would read an array by with the manifest."""
    found = read_json(file)
    for key, value in expected.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"{file}: {key} is {shown(found.get(key))}, the manifest says {shown(value)}: the "
                "conversion is damaged, convert the model again"
            )
