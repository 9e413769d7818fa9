"""Arrays under a checkpoint's names -> parameters of our tree."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxengine.compat.similar_names import did_you_mean
from jaxengine.convert.families import family_of, model_spec
from jaxengine.convert.parameters import Parameter, Piece, with_prefix
from jaxengine.convert.rules import Rule, Source, Table
from jaxengine.convert.tensors import Index
from jaxengine.weights import ParamSpec


@dataclass(frozen=True)
class ArrayTensor:
    """A tensor that is in memory already."""

    name: str
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Type."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.values.nbytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the first axis, copied: jax may keep what it is given."""
        return np.array(self.values[start:stop] if self.values.ndim else self.values)


@dataclass(frozen=True)
class PatchedParameter(Parameter):
    """A parameter of which some pieces are new.

    Attributes:
        before: The whole parameter, where the new pieces do not fill it; None where they do.
    """

    before: np.ndarray | None = None

    def _read(self, whole: Index) -> np.ndarray:
        if self.before is None:
            return super()._read(whole)
        out = np.array(self.before[whole], self.dtype)
        for piece in self.pieces:
            self._fill(out, whole, piece)
        return out


def table_of(hf_config: Mapping[str, Any]) -> Table:
    """Return the table of a config.json."""
    config = dict(hf_config)
    return family_of(config).table(model_spec(config))


def as_array(value: Any) -> np.ndarray:
    """Return an array of numpy, jax or torch (on any device, also in bfloat16) as one of numpy."""
    if hasattr(value, "detach"):  # torch's, which is not imported here
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    return np.asarray(value)


def parameters_of_arrays(
    arrays: Iterable[tuple[str, Any]],
    hf_config: Mapping[str, Any],
    current: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
) -> list[Parameter]:
    """Read parameters from arrays under a checkpoint's names: all of a model, or some.

    Args:
        arrays: Pairs of name and array, in the shapes of a checkpoint.
        hf_config: The model's config.json.
        current: The engine's arrays by path, for what the new ones leave as it is.
        specs: How those are held.

    Raises:
        ValueError: If a name is not the model's, comes twice, or has another shape.
    """
    table = table_of(hf_config)
    given: dict[str, ArrayTensor] = {}
    for name, value in arrays:
        if name in given:
            raise ValueError(f"{name} is given twice: give each tensor once")
        given[name] = ArrayTensor(name, as_array(value))
    found = with_prefix(given, table)
    sources = _sources_by_name(table)
    for name, tensor in found.items():
        if name not in sources and name.endswith(table.ignored):
            continue
        if name not in sources:
            raise ValueError(
                f"{name} is no tensor of the model{did_you_mean(name, sources)}; nothing has "
                "changed: use the names of its checkpoint"
            )
        if tensor.shape != sources[name].shape:
            raise ValueError(
                f"{name} has shape {tensor.shape}, expected {sources[name].shape}; nothing has "
                "changed"
            )
    patched = (_patched(rule, found, current, specs) for rule in table.rules)
    return [parameter for parameter in patched if parameter is not None]


def _sources_by_name(table: Table) -> dict[str, Source]:
    return {
        name: source
        for rule in table.rules
        for source in rule.sources
        for name in (source.name, *source.others)
    }


def _patched(
    rule: Rule,
    found: Mapping[str, Any],
    current: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
) -> PatchedParameter | None:
    """The parameter of a rule with the pieces that are there; None if there are none."""
    pieces = []
    for source in rule.sources:
        name = next((n for n in (source.name, *source.others) if n in found), None)
        if name is not None:
            pieces.append(Piece(found[name], replace(source, name=name)))
    if not pieces or rule.path not in specs:
        return None
    spec = specs[rule.path]
    before = None
    if len(pieces) < len(rule.sources):
        before = in_checkpoint_order(np.asarray(current[rule.path]), spec)
    dtype = np.dtype(spec.dtype)
    return PatchedParameter(rule.path, rule.shape, dtype, tuple(pieces), rule.is_normalised, before)


def in_checkpoint_order(values: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """A parameter as it is held -> in the shape and order that a checkpoint gives it."""
    if spec.num_in_axes:
        axes = range(values.ndim)
        values = values.transpose(*axes[spec.num_in_axes :], *axes[: spec.num_in_axes])
    if (repeats := spec.kv_repeats) == 1:
        return values
    held, width, *rest = values.shape
    heads = values.reshape(held // repeats, repeats, width, *rest)
    queries = heads[:, :, : width - 2].reshape(held // repeats, repeats * (width - 2), *rest)
    return np.concatenate([queries, heads[:, 0, width - 2 :]], axis=1)
