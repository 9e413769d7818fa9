"""Writes a checkpoint as an Orbax checkpoint of our tree, block by block, and publishes it whole.

Orbax saves a tree of arrays that are all in memory. Here the leaves of the tree are parameters
that are still in their files, and a type handler of our own streams each to disk; Orbax writes
everything else, so that ``StandardCheckpointer().restore`` reads the result. Orbax's own handlers
were no option: they want all arrays at once, copy each up to three times, and compress (zstd),
which is an order of magnitude slower than a disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxengine.convert import converted
from jaxengine.convert.checkpoint import CONFIG, GENERATION_CONFIG, Checkpoint, write_files
from jaxengine.convert.parameters import Parameter, parameters
from jaxengine.convert.readers import open_checkpoint
from jaxengine.convert.supported import check_supported
from tqdm import tqdm


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote, and how long it took."""

    out_dir: Path
    num_tensors: int
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.num_bytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"{self.out_dir}: {self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB "
            f"in {self.seconds:.1f} s ({rate:.0f} MB/s)"
        )


def convert_checkpoint(
    source: str | Path,
    out_dir: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ConversionSummary:
    """Convert a checkpoint of any format into a directory that loads without further work.

    Args:
        source: Whatever ``open_checkpoint`` takes.
        out_dir: Directory to make. It appears when all is written, or not at all.
        dtype: "bfloat16", "float16" or "float32"; None keeps what each tensor has.
        overwrite: Whether an earlier conversion in ``out_dir`` may be replaced.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the source cannot be converted, ``out_dir`` is taken, or the disk too small.
    """
    start = time.perf_counter()
    out = Path(os.path.abspath(Path(out_dir).expanduser()))
    _check_target(out, overwrite)
    checkpoint = open_checkpoint(source, check_config=check_supported)
    tree = list(parameters(checkpoint, dtype))
    files = _small_files(checkpoint, dtype)
    num_bytes = sum(parameter.nbytes for parameter in tree)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_space(out.parent, num_bytes)
    _remove_rests(out)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}{converted.INCOMPLETE}", dir=out.parent))
    with holding(partial):
        try:
            partial.chmod(0o755)  # mkdtemp makes it private
            write_files(partial, files)
            with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
                _write_parameters(partial / converted.PARAMETERS, tree, bar)
            _sync(partial)
            _write_manifest(partial, tree)
            _publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return ConversionSummary(out, len(tree), num_bytes, time.perf_counter() - start)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out} exists: choose another directory, or pass --overwrite")
    if not converted.is_converted(out):
        raise ValueError(f"{out} is no converted checkpoint, so it is not overwritten: delete it")


@contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Lock a directory, so that another process can see that somebody works in it.

    Raises:
        BlockingIOError: If somebody does.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_rests(out: Path) -> None:
    """Delete what killed conversions to the same place have left."""
    for path in converted.interrupted(out):
        # While ``out`` is not there, its predecessor under another name is all there is.
        if converted.INCOMPLETE in path.name or out.exists():
            with suppress(BlockingIOError), holding(path):
                shutil.rmtree(path)


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise ValueError(
            f"the parameters need {num_bytes / 1e9:.2f} GB, {directory} has {free / 1e9:.2f} GB "
            "free: choose another disk, or a smaller --dtype"
        )


def _small_files(checkpoint: Checkpoint, dtype: str | None) -> dict[str, bytes]:
    """The tokenizer, config.json and generation_config.json, as file name -> content."""
    config = dict(checkpoint.hf_config)
    if dtype is not None:
        # Old configs say torch_dtype, new ones dtype; a reader may look at either.
        config = {**config, "dtype": dtype, "torch_dtype": dtype}
    files = {**checkpoint.tokenizer_files(), CONFIG: _json(config)}
    if checkpoint.generation_config:
        files[GENERATION_CONFIG] = _json(checkpoint.generation_config)
    return files


def _write_parameters(directory: Path, tree: list[Parameter], bar: tqdm[Any]) -> None:
    """Write the Orbax checkpoint."""
    import orbax.checkpoint as ocp
    from jaxengine.convert.orbax_handler import StreamingHandler

    registry = ocp.type_handlers.create_type_handler_registry((Parameter, StreamingHandler(bar)))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
        leaves = {parameter.path: parameter for parameter in tree}
        checkpointer.save(directory, args=ocp.args.PyTreeSave(leaves))


def _write_manifest(directory: Path, tree: list[Parameter]) -> None:
    tensors = [
        {"name": p.path, "shape": p.shape, "dtype": p.dtype.name, "nbytes": p.nbytes} for p in tree
    ]
    manifest = {"format": converted.FORMAT, "version": converted.VERSION, "tensors": tensors}
    path = directory / converted.MANIFEST
    path.write_bytes(_json(manifest))
    _sync_path(path)
    _sync_path(directory)


def _publish(partial: Path, out: Path) -> None:
    """Give the finished directory its name."""
    unique = partial.name.removeprefix(out.name + converted.INCOMPLETE)
    replaced = out.with_name(f"{out.name}{converted.REPLACED}{unique}")
    if converted.is_converted(out):
        out.rename(replaced)
    partial.rename(out)
    _sync_path(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Wait until every file and directory is on the disk."""
    # Side by side, because a file system writes its journal once for all that wait for it.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_sync_path, _walk(directory)))


def _walk(directory: Path) -> Iterator[Path]:
    for root, _, names in os.walk(directory, topdown=False):
        yield from (Path(root, name) for name in names)
        yield Path(root)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
