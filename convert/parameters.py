"""Parameters of our tree, read from a checkpoint one at a time, whole or only a slice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxengine.convert.checkpoint import Checkpoint
from jaxengine.convert.families import family_of, model_spec
from jaxengine.convert.quantised import plain_tensors
from jaxengine.convert.rules import Rule, Source, Table
from jaxengine.convert.tensors import DTYPES, Index, StoredTensor, full_index, read, read_box


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint, and what it fills of a parameter."""

    tensor: StoredTensor
    source: Source

    def read(self, index: Index) -> np.ndarray:
        """Cut ``index`` out of the box, touching few rows of the tensor that are not needed."""
        source = self.source
        if source.is_plain:
            return read_box(self.tensor, source.box, index)
        first, last = source.rows or (0, self.tensor.shape[0])
        view = source.view or source.box
        lead = index[0]
        # Where the parameter's first axis is the view's, only the rows in question are read.
        if (not source.axes or source.axes[0] == 0) and view[0] == source.box[0]:
            each = (last - first) // view[0]
            first, last = first + lead.start * each, first + lead.stop * each
            view, lead = (lead.stop - lead.start, *view[1:]), slice(None)
        values = self.tensor.rows(first, last).reshape(view)
        values = values[tuple(slice(None) if cut is None else slice(*cut) for cut in source.cut)]
        if source.axes:
            values = values.transpose(source.axes)
        box = (view[0] if lead == slice(None) else source.box[0], *source.box[1:])
        return values.reshape(box)[(lead, *index[1:])]


@dataclass(frozen=True)
class Parameter:
    """A parameter of our tree: where its values lie, and how to read them.

    Attributes:
        path: Dotted path in the tree.
        shape: Shape of the whole parameter.
        dtype: Dtype that ``load`` returns.
        pieces: What fills it.
        is_normalised: Whether each row is divided by its length.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]
    is_normalised: bool = False

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
        if self.is_normalised:
            rows = self._read((*whole[:-1], slice(0, self.shape[-1])))
            return _normalised(rows)[..., whole[-1]]
        return self._read(whole)

    def _read(self, whole: Index) -> np.ndarray:
        if len(self.pieces) == 1 and self.pieces[0].tensor.dtype == self.dtype:
            return self.pieces[0].read(whole)
        out = np.empty([part.stop - part.start for part in whole], self.dtype)
        for piece in self.pieces:
            self._fill(out, whole, piece)
        return out

    def __getitem__(self, index: slice | Index) -> np.ndarray:
        """Same as ``load``."""
        return self.load(index if isinstance(index, tuple) else (index,))

    def _fill(self, out: np.ndarray, index: Index, piece: Piece) -> None:
        box = piece.source.box
        origin = (*piece.source.origin, *(0,) * (len(box) - len(piece.source.origin)))
        inside, target = [], []
        for wanted, size, begin in zip(index, box, origin, strict=True):
            start, stop = max(wanted.start, begin), min(wanted.stop, begin + size)
            if start >= stop:
                return
            inside.append(slice(start - begin, stop - begin))
            target.append(slice(start - wanted.start, stop - wanted.start))
        out[tuple(target)] = piece.read(tuple(inside))


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, computed in float32; a row of zeros stays one."""
    wide = rows.astype(np.float32)
    lengths = np.sqrt(np.sum(np.square(wide), axis=-1, keepdims=True))
    return (wide / np.maximum(lengths, 1e-12)).astype(rows.dtype)


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
    table = family_of(checkpoint.hf_config).table(model_spec(checkpoint.hf_config))
    found = with_prefix(plain_tensors(checkpoint.tensors, checkpoint.hf_config), table)
    rules = [_resolved(rule, found) for rule in table.rules]
    _check(rules, table, found, checkpoint)
    return (_parameter(rule, found, target) for rule in rules)


def with_prefix(tensors: Mapping[str, StoredTensor], table: Table) -> Mapping[str, StoredTensor]:
    """The tensors under the table's names, without those that are not computed.

    The checkpoint may be one of the bare model, or of a model around it.
    """
    tensors = {
        _renamed(name, table): tensor
        for name, tensor in tensors.items()
        if not name.startswith(table.unused)
    }
    prefix = table.prefix
    wanted = {source.name for rule in table.rules for source in rule.sources}
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return tensors
    return {
        f"{prefix}{name}" if f"{prefix}{name}" in wanted else name: tensor
        for name, tensor in tensors.items()
    }


def _renamed(name: str, table: Table) -> str:
    for beginning, ours in table.renamed:
        if name.startswith(beginning):
            return ours + name.removeprefix(beginning)
    return name


def _resolved(rule: Rule, found: Mapping[str, StoredTensor]) -> Rule:
    """The rule with the names that this checkpoint uses."""
    if not any(source.others for source in rule.sources):
        return rule
    return replace(rule, sources=tuple(_named(source, found) for source in rule.sources))


def _named(source: Source, found: Mapping[str, StoredTensor]) -> Source:
    names = (source.name, *source.others)
    return replace(source, name=next((n for n in names if n in found), source.name))


def _as_stored(tensor: StoredTensor, dtype: np.dtype | None) -> Parameter:
    piece = Piece(tensor, Source(tensor.name, tensor.shape, tensor.shape))
    return Parameter(tensor.name, tensor.shape, dtype or tensor.dtype, (piece,))


def _parameter(rule: Rule, found: Mapping[str, StoredTensor], dtype: np.dtype | None) -> Parameter:
    pieces = tuple(Piece(found[source.name], source) for source in rule.sources)
    dtypes = {piece.tensor.dtype for piece in pieces}
    stored = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
    return Parameter(rule.path, rule.shape, dtype or stored, pieces, rule.is_normalised)


def _check(
    rules: list[Rule], table: Table, found: Mapping[str, StoredTensor], checkpoint: Checkpoint
) -> None:
    sources = {source.name: source for rule in rules for source in rule.sources}
    missing = [name for name in sources if name not in found]
    unknown = [
        name
        for name, tensor in found.items()
        if name not in sources and not name.endswith(table.ignored) and not _adds_nothing(tensor)
    ]
    wrong = [
        f"{name} (expected {source.shape}, found {found[name].shape})"
        for name, source in sources.items()
        if name in found and found[name].shape != source.shape
    ]
    problems = (("missing tensors", missing), ("unknown tensors", unknown), ("wrong shapes", wrong))
    lines = [f"{what}: {_listed(names)}" for what, names in problems if names]
    if lines:
        architecture = checkpoint.hf_config["architectures"][0]
        raise ValueError(
            f"{checkpoint.source} does not match its config ({architecture}). " + "; ".join(lines)
        )


def _adds_nothing(tensor: StoredTensor) -> bool:
    """Whether it is a bias of zeros, which some tools store for every linear layer."""
    is_bias = tensor.name.endswith(".bias") and len(tensor.shape) == 1
    return is_bias and not np.any(read(tensor))


MAX_NAME = 100  # characters of a name there
MOST_NAMES = 20  # that an error lists: the reason shows in the first ones


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    listed = ", ".join(name[:MAX_NAME] for name in names[:MOST_NAMES])
    return f"{listed} and {more} more" if more > 0 else listed
