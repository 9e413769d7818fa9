"""Teaches Orbax to save parameters that are not in memory. Needs jax, so only saving imports it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orbax.checkpoint as ocp
from jaxengine.convert.converted import chunk_path, zarr_metadata
from jaxengine.convert.parameters import Parameter
from jaxengine.convert.tensors import Index
from tqdm import tqdm

# What is in memory at a time, with as much again of mapped source pages. Larger was not faster.
BLOCK_BYTES = 32 * 2**20


class StreamingHandler(ocp.type_handlers.TypeHandler):
    """Writes each parameter as an uncompressed zarr array of one chunk, block by block."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def typestr(self) -> str:
        """How Orbax records the leaf, hence what it restores it as."""
        return "np.ndarray"

    async def serialize(
        self, values: Sequence[Parameter], infos: Sequence[Any], args: Any = None
    ) -> Sequence[ocp.future.Future]:
        """Write the parameters one after the other; all are written when this returns."""
        # Flushing an array while the next one is read keeps the disk busy in both directions.
        with ThreadPoolExecutor(1) as pool:
            flushed: Future[None] | None = None
            for parameter, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                file = _write_array(Path(info.path), parameter, self._bar)
                if flushed is not None:
                    flushed.result()
                flushed = pool.submit(_flush, file)
            if flushed is not None:
                flushed.result()
        return []

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Not needed: Orbax's own handlers read what this one wrote."""
        raise NotImplementedError("StreamingHandler only writes")

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Not needed: Orbax's own handlers read what this one wrote."""
        raise NotImplementedError("StreamingHandler only writes")


def blocks(shape: tuple[int, ...], itemsize: int, max_bytes: int) -> Iterator[Index]:
    """Cut an array into runs of its C order, each of at most ``max_bytes`` (or one element)."""
    if not shape:
        yield ()
        return
    row_bytes = math.prod(shape[1:]) * itemsize
    if row_bytes > max_bytes:
        for i in range(shape[0]):
            for inner in blocks(shape[1:], itemsize, max_bytes):
                yield (slice(i, i + 1), *inner)
        return
    step = max(1, max_bytes // max(row_bytes, 1))
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),)


def _write_array(directory: Path, parameter: Parameter, bar: tqdm[Any]) -> BinaryIO:
    """Write one array; what it returns is open and has yet to be flushed."""
    directory.mkdir(parents=True)
    (directory / ".zarray").write_text(json.dumps(zarr_metadata(parameter.shape, parameter.dtype)))
    file = chunk_path(directory, len(parameter.shape)).open("wb")
    for index in blocks(parameter.shape, parameter.dtype.itemsize, BLOCK_BYTES):
        values = np.ascontiguousarray(parameter.load(index)).reshape(-1)
        file.write(values.view(np.uint8).data)
        bar.update(values.nbytes)
    return file


def _flush(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())
