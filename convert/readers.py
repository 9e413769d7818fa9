"""Opens a checkpoint of any format: finds out which it is, checks the files, loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxengine.convert import converted, gguf, hub
from jaxengine.convert.checkpoint import Checkpoint, read_json, read_tokenizer_files
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


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a model for reading.

    Args:
        source: A Hugging Face directory (safetensors or pytorch_model.bin, sharded or not), a
            directory that ``convert_checkpoint`` wrote, a GGUF file, or a hub name
            ("organisation/model").
        revision: Branch, tag or commit of a hub model; None is its main branch.

    Returns:
        The checkpoint. Headers are read and checked against the files; no tensor is loaded.

    Raises:
        ValueError: If there is no such model, its files are damaged, or it cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return gguf.open_gguf(path)
    if path.is_dir():
        return _open_directory(path)
    converted.refuse_interrupted(path)
    if isinstance(source, str) and hub.is_hub_name(source):
        return _open_directory(hub.fetch(source, revision))
    raise ValueError(
        f"{str(source)!r} is neither a directory, a GGUF file nor a hub name (organisation/model)"
    )


def _open_directory(path: Path) -> Checkpoint:
    if converted.is_converted(path):
        return converted.open_converted(path)
    converted.refuse_interrupted(path)
    for file_name, file_format, open_file in WEIGHT_FILES:
        if (path / file_name).is_file():
            return _open_hugging_face(path, path / file_name, file_format, open_file)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return gguf.open_gguf(gguf_files[0])
    raise ValueError(
        f"{path} holds no weights: looked for {', '.join(name for name, _, _ in WEIGHT_FILES)} "
        f"and one *.gguf, found {', '.join(sorted(p.name for p in path.iterdir())) or 'nothing'}"
    )


def _open_hugging_face(
    path: Path, weights: Path, file_format: str, open_file: OpenFile
) -> Checkpoint:
    generation_config = path / "generation_config.json"
    is_index = weights.suffix == ".json"
    return Checkpoint(
        source=path,
        format=file_format,
        hf_config=read_json(path / "config.json"),
        tensors=_open_shards(weights, open_file) if is_index else open_file(weights),
        tokenizer_files=lambda: read_tokenizer_files(path),
        generation_config=read_json(generation_config) if generation_config.is_file() else {},
    )


def _open_shards(index: Path, open_file: OpenFile) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        expected = [name for name, file in weight_map.items() if file == shard]
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ValueError(
                f"{index} names the file {shard!r}, which is missing; it holds {len(expected)} "
                f"tensors, the first is {expected[0]!r}. Fetch the model again."
            )
        found = open_file(index.parent / shard)
        missing = [name for name in expected if name not in found]
        if missing:
            raise ValueError(f"{index.parent / shard} lacks tensors the index names: {missing}")
        tensors.update(found)
    return tensors
