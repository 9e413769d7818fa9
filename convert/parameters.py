"""Parameters of our tree, read from a checkpoint one at a time, whole or only a slice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxengine.convert.checkpoint import Checkpoint
from jaxengine.convert.rules import Rule, Table, table_for
from jaxengine.convert.tensors import DTYPES, Index, StoredTensor, full_index, read_box


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint, seen in the shape that it has in the parameter."""

    tensor: StoredTensor
    box: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of our tree: where its values lie, and how to read them.

    Attributes:
        path: Dotted path in the tree.
        shape: Shape of the whole parameter.
        dtype: Dtype that ``load`` returns.
        pieces: Tensors, joined along ``axis``.
        axis: Axis along which they are joined.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]
    axis: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter in ``dtype``."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self, index: Index | None = None) -> np.ndarray:
        """The values, or the part of them that ``index`` cuts out; only that part is read.

        ``jax.make_array_from_callback(p.shape, sharding, p.load)`` fills a sharded array.

        Args:
            index: A slice for each leading axis, step 1; None for the whole parameter.

        Returns:
            Array of ``dtype``, in memory of its own or a read-only view of the mapped file.

        Raises:
            ValueError: If the index does not fit the shape.
        """
        whole = full_index(self.shape, index)
        if len(self.pieces) == 1 and self.pieces[0].tensor.dtype == self.dtype:
            return read_box(self.pieces[0].tensor, self.pieces[0].box, whole)
        out = np.empty([part.stop - part.start for part in whole], self.dtype)
        self._fill(out, whole)
        return out

    def __getitem__(self, index: slice | Index) -> np.ndarray:
        """Same as ``load``."""
        return self.load(index if isinstance(index, tuple) else (index,))

    def _fill(self, out: np.ndarray, index: Index) -> None:
        wanted, before = index[self.axis], (slice(None),) * self.axis
        begin = 0  # where the piece starts along the axis
        for piece in self.pieces:
            end = begin + piece.box[self.axis]
            start, stop = max(wanted.start, begin), min(wanted.stop, end)
            if start < stop:
                inside = (*index[: self.axis], slice(start - begin, stop - begin))
                part = read_box(piece.tensor, piece.box, (*inside, *index[self.axis + 1 :]))
                target = (*before, slice(start - wanted.start, stop - wanted.start))
                out[target] = part
            begin = end


def parameters(checkpoint: Checkpoint, dtype: str | None = None) -> Iterator[Parameter]:
    """Every parameter of the model, checked before the first is given out.

    Args:
        checkpoint: An opened checkpoint.
        dtype: "bfloat16", "float16" or "float32"; None for what each tensor is stored in.

    Returns:
        Iterator over the parameters in the order of the layers.

    Raises:
        ValueError: If the architecture is not supported, or tensors are missing, unknown or
            mis-shaped: all are named.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    target = None if dtype is None else DTYPES[dtype]
    if checkpoint.format == "converted":
        return (_as_stored(tensor, target) for tensor in checkpoint.tensors.values())
    table = table_for(checkpoint.hf_config)
    rules = [rule for rule in table.expand() if _applies(rule, checkpoint)]
    _check(rules, table, checkpoint)
    return (_parameter(rule, checkpoint, target) for rule in rules)


def _as_stored(tensor: StoredTensor, dtype: np.dtype | None) -> Parameter:
    piece = Piece(tensor, tensor.shape)
    return Parameter(tensor.name, tensor.shape, dtype or tensor.dtype, (piece,))


def _parameter(rule: Rule, checkpoint: Checkpoint, dtype: np.dtype | None) -> Parameter:
    pieces = tuple(Piece(checkpoint.tensors[s.name], s.box) for s in rule.sources)
    found = {piece.tensor.dtype for piece in pieces}
    stored = found.pop() if len(found) == 1 else DTYPES["float32"]
    return Parameter(rule.path, rule.shape, dtype or stored, pieces, rule.axis)


def _applies(rule: Rule, checkpoint: Checkpoint) -> bool:
    return not rule.optional or any(s.name in checkpoint.tensors for s in rule.sources)


def _check(rules: list[Rule], table: Table, checkpoint: Checkpoint) -> None:
    sources = {source.name: source for rule in rules for source in rule.sources}
    found = checkpoint.tensors
    missing = [name for name in sources if name not in found]
    unknown = [n for n in found if n not in sources and not n.endswith(table.ignored)]
    wrong = [
        f"{name} (expected {source.shape}, found {found[name].shape})"
        for name, source in sources.items()
        if name in found and found[name].shape != source.shape
    ]
    problems = (("missing tensors", missing), ("unknown tensors", unknown), ("wrong shapes", wrong))
    lines = [f"{what}: {', '.join(names)}" for what, names in problems if names]
    if lines:
        quantised = checkpoint.hf_config.get("quantization_config")
        if quantised and checkpoint.format != "gguf":
            lines.append(f"the checkpoint is quantised ({quantised}), which is not supported yet")
        architecture = checkpoint.hf_config["architectures"][0]
        raise ValueError(
            f"{checkpoint.source} does not match its config ({architecture}). " + "; ".join(lines)
        )
