"""The points of a model that can be looked into: their names, shapes and meanings."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxengine.convert.model_spec import AttentionSpec, LayerSpec, ModelSpec
from jaxengine.sharding import LOGITS_SPEC, TENSOR_AXIS

WHOLE, HEADS = P(None, None), P(None, TENSOR_AXIS, None)


@dataclass(frozen=True)
class Point:
    """A value inside a model that has a name.

    Attributes:
        name: Such as ``layers.3.attention.added``.
        shape: Its axes: "T" for the number of tokens, all others as numbers.
        meaning: What it is, in a line.
        spec: How it is cut over the shards; ``capture`` gives it whole.
    """

    name: str
    shape: tuple[str | int, ...]
    meaning: str
    spec: Any = WHOLE

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(map(str, self.shape))}]: {self.meaning}"


def points_of(spec: ModelSpec) -> tuple[Point, ...]:
    """Return the points of a model, in the order in which a token passes them."""
    stream = ("T", spec.hidden_size)
    points = [Point("embedding", stream, "the stream before the first layer")]
    for number, layer in enumerate(spec.layers):
        points += _points_of_layer(f"layers.{number}", layer, stream)
    points.append(Point("final", stream, "the stream behind the last norm, that the head reads"))
    points.append(Point("logits", ("T", spec.vocab_size), "scores of the next token", LOGITS_SPEC))
    return tuple(points)


def _points_of_layer(name: str, layer: LayerSpec, stream: tuple[str | int, ...]) -> list[Point]:
    points = [Point(f"{name}.input", stream, "the stream before the layer")]
    if isinstance(own := layer.attention, AttentionSpec):
        points += _points_of_attention(f"{name}.attention", own, stream)
        if layer.wiring != "parallel":
            points.append(Point(f"{name}.middle", stream, "the stream between attention and mlp"))
    if layer.feed_forward is not None:
        points += [
            Point(f"{name}.mlp.input", stream, "what the feed-forward part reads, normalised"),
            Point(f"{name}.mlp.added", stream, "what it adds to the stream"),
        ]
    return [*points, Point(f"{name}.output", stream, "the stream behind the layer")]


def _points_of_attention(
    name: str, own: AttentionSpec, stream: tuple[str | int, ...]
) -> list[Point]:
    N, K, H = own.num_heads, own.num_kv_heads, own.head_dim
    return [
        Point(f"{name}.input", stream, "what attention reads, normalised"),
        Point(f"{name}.q", ("T", N, H), "queries, normalised and rotated", HEADS),
        Point(f"{name}.k", ("T", K, H), "keys, normalised and rotated", HEADS),
        Point(f"{name}.v", ("T", K, H), "values", HEADS),
        Point(f"{name}.pattern", ("T", N, "T"), "probabilities: query, head, key", HEADS),
        Point(f"{name}.heads", ("T", N, H), "what each head gives, before the projection", HEADS),
        Point(f"{name}.added", stream, "what attention adds to the stream"),
    ]


def chosen_points(points: Sequence[Point], wanted: str | Iterable[str]) -> tuple[Point, ...]:
    """Return the points that names, wildcards and ranges mean, in the order of the model.

    Args:
        points: All of the model.
        wanted: One or several of: a name; one with ``*``, ``?`` or ``[...]``; one whose layer is a
            range as Python slices (``layers.2:5.output``, ``layers.::2.output``), or counted from
            the end (``layers.-1.output``).

    Raises:
        ValueError: If one of them means no point; the nearest names are told.
    """
    names = [point.name for point in points]
    layers = sorted({int(name.split(".")[1]) for name in names if name.startswith("layers.")})
    chosen: set[str] = set()
    for each in [wanted] if isinstance(wanted, str) else wanted:
        patterns = _spelt_out(each, layers)
        found = {name for p in patterns for name in fnmatch.filter(names, p)}
        if not found:
            raise ValueError(f"the model has no point {each!r}{_nearest(each, names, layers)}")
        chosen |= found
    return tuple(point for point in points if point.name in chosen)


def _spelt_out(pattern: str, layers: Sequence[int]) -> list[str]:
    """The pattern once for each layer of its range; itself if it has none."""
    first, _, rest = pattern.partition(".")
    number, _, rest = rest.partition(".")
    try:
        if first != "layers" or not (":" in number or number.startswith("-")):
            return [pattern]
        if ":" not in number:
            return [f"layers.{layers[int(number)]}.{rest}"]
        bounds = [int(part) if part else None for part in number.split(":")]
        return [f"layers.{layer}.{rest}" for layer in layers[slice(*bounds)]]
    except (ValueError, IndexError, TypeError):
        return []


def _nearest(wanted: str, names: Sequence[str], layers: Sequence[int]) -> str:
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    told = f": the nearest are {', '.join(near)}" if near else ""
    return f"{told}; it has {len(layers)} layers, and points() lists all names"
