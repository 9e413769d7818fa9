"""Opens a checkpoint of any format: finds out which it is, checks the files, loads nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxengine.convert import converted, gguf, hub
from jaxengine.convert.checkpoint import (
    Checkpoint,
    config_of,
    read_generation_config,
    read_tokenizer_files,
)
from jaxengine.convert.errors import CheckpointError, shown
from jaxengine.convert.hub import CheckConfig
from jaxengine.convert.json_file import read_json
from jaxengine.convert.safetensors_file import open_safetensors
from jaxengine.convert.tensors import StoredTensor
from jaxengine.convert.torch_file import open_torch_file

OpenFile = Callable[[Path], Mapping[str, StoredTensor]]

# Weight file, format, reader: the first that is there is taken, so safetensors before pickles.
WEIGHT_FILES: tuple[tuple[str, str, OpenFile], ...] = (
    ("model.safetensors", "safetensors", open_safetensors),
    ("model.safetensors.index.json", "safetensors", open_safetensors),
    ("pytorch_model.bin", "pytorch_bin", open_torch_file),
    ("pytorch_model.bin.index.json", "pytorch_bin", open_torch_file),
)

WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".bin")  # a text that ends so is meant as a path


def open_checkpoint(
    source: str | Path, revision: str | None = None, check_config: CheckConfig | None = None
) -> Checkpoint:
    """Open a model for reading.

    Args:
        source: A Hugging Face directory (safetensors or pytorch_model.bin, sharded or not), a
            directory that ``convert_checkpoint`` wrote, a GGUF file (of a split one, any part),
            or a hub name ("organisation/model").
        revision: Branch, tag or commit of a hub model; None is its main branch.
        check_config: Raises if a model of this config.json cannot be used; called before anything
            else of the model is fetched or opened.

    Returns:
        The checkpoint. Headers are read and checked against the files; no tensor is loaded.

    Raises:
        CheckpointError: If there is no such model, its files are damaged, or it cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _checked(gguf.open_gguf(path), check_config)
    if path.is_dir():
        return _open_directory(path, check_config)
    converted.refuse_interrupted(path)
    if isinstance(source, str) and path.suffix not in WEIGHT_SUFFIXES and hub.is_hub_name(source):
        return _open_directory(hub.fetch(source, revision, check_config), check_config)
    is_path = path.suffix in WEIGHT_SUFFIXES or len(path.parts) > 1 or str(source)[:1] in "./~"
    raise CheckpointError(
        f"{str(source)!r} {'is missing: it ' if is_path else ''}is neither a directory, a GGUF "
        "file nor a hub name (organisation/model)"
    )


def _checked(checkpoint: Checkpoint, check_config: CheckConfig | None) -> Checkpoint:
    if check_config is not None:
        check_config(checkpoint.hf_config)
    return checkpoint


def _open_directory(path: Path, check_config: CheckConfig | None) -> Checkpoint:
    if converted.is_converted(path):
        return _checked(converted.open_converted(path), check_config)
    converted.refuse_interrupted(path)
    for file_name, file_format, open_file in WEIGHT_FILES:
        if (path / file_name).is_file():
            config = config_of(path)
            if check_config is not None:
                check_config(config)
            return _open_hugging_face(path, config, path / file_name, file_format, open_file)
    gguf_file = gguf.first_part(sorted(path.glob("*.gguf")))
    if gguf_file is not None:
        return _checked(gguf.open_gguf(gguf_file), check_config)
    raise CheckpointError(
        f"{path} holds no weights: looked for {', '.join(name for name, _, _ in WEIGHT_FILES)} "
        f"and one *.gguf, found {', '.join(sorted(p.name for p in path.iterdir())) or 'nothing'}"
    )


def _open_hugging_face(
    path: Path, config: dict[str, Any], weights: Path, file_format: str, open_file: OpenFile
) -> Checkpoint:
    is_index = weights.suffix == ".json"
    return Checkpoint(
        source=path,
        format=file_format,
        hf_config=config,
        tensors=_open_shards(weights, open_file) if is_index else open_file(weights),
        tokenizer_files=lambda: read_tokenizer_files(path),
        generation_config=read_generation_config(path),
    )


def _open_shards(index: Path, open_file: OpenFile) -> dict[str, StoredTensor]:
    """The tensors that the index names, each from the shard in which it says it lies.

    Other tensors of a shard, such as an older copy, and other files of the directory do not count.
    """
    weight_map = _weight_map(index)
    names_of: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, []).append(name)
    for shard, names in names_of.items():
        if Path(shard).name != shard or not _is_file(index.parent / shard):
            raise CheckpointError(
                f"{index} names the file {shown(shard)}, which is missing; it holds {len(names)} "
                f"tensors, the first is {shown(names[0])}. Fetch the model again."
            )
    found = {shard: open_file(index.parent / shard) for shard in sorted(names_of)}
    return {name: _from_shard(index, name, shard, found) for name, shard in weight_map.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long for one
        return False


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or "\0" in shard:
            raise CheckpointError(
                f"{index}: the file of tensor {shown(name)} is {shown(shard)}, expected a name: "
                "fetch it again"
            )
    return weight_map


def _from_shard(
    index: Path, name: str, shard: str, found: Mapping[str, Mapping[str, StoredTensor]]
) -> StoredTensor:
    if name in found[shard]:
        return found[shard][name]
    others = [other for other, tensors in found.items() if name in tensors]
    if len(others) != 1:
        raise CheckpointError(
            f"{index.parent / shard} lacks tensors that {index.name} says it has: the first is "
            f"{shown(name)}, found in {', '.join(others) or 'no shard'}. Fetch the model again."
        )
    warnings.warn(
        f"{index} says that {name!r} lies in {shard}, it lies in {others[0]} and is taken from "
        "there: the index is out of date",
        stacklevel=2,
    )
    return found[others[0]][name]
