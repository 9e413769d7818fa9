"""The table that says how Hugging Face's tensors become our parameters, and the families' registry.

A parameter is one or more tensors laid side by side along one axis, each first seen in another
shape of as many elements. Orientation stays [out, in]: nothing is transposed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint and its place in a parameter.

    Attributes:
        name: Hugging Face's name; ``{i}`` stands for the layer.
        shape: The shape it must have in the checkpoint.
        box: The shape it takes in the parameter.
    """

    name: str
    shape: Shape
    box: Shape


@dataclass(frozen=True)
class Rule:
    """One parameter: the boxes of its sources, joined along ``axis``.

    Attributes:
        path: Our dotted path; ``{i}`` stands for the layer.
        sources: Tensors in the order in which they are joined.
        axis: Axis along which they are joined.
        optional: Whether the checkpoint may lack all of its sources.
    """

    path: str
    sources: tuple[Source, ...]
    axis: int = 0
    optional: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of the parameter."""
        box = self.sources[0].box
        joined = sum(source.box[self.axis] for source in self.sources)
        return (*box[: self.axis], joined, *box[self.axis + 1 :])


@dataclass(frozen=True)
class Table:
    """What a family's checkpoint holds.

    Attributes:
        rules: One for each parameter; a path with ``{i}`` counts once a layer.
        num_layers: How many layers ``{i}`` runs over.
        ignored: Endings of tensor names that are no parameters (buffers of old checkpoints).
    """

    rules: tuple[Rule, ...]
    num_layers: int
    ignored: tuple[str, ...] = ()

    def expand(self) -> Iterable[Rule]:
        """Every rule with its layer filled in, layers together and in order."""
        in_layers = [rule for rule in self.rules if "{i}" in rule.path]
        yield from (rule for rule in self.rules if rule.path.startswith("embed"))
        for i in range(self.num_layers):
            for rule in in_layers:
                yield _fill(rule, i)
        for rule in self.rules:
            if "{i}" not in rule.path and not rule.path.startswith("embed"):
                yield rule


def same(path: str, name: str, shape: Shape, optional: bool = False) -> Rule:
    """A rule for a tensor that only changes its name."""
    return Rule(path, (Source(name, shape, shape),), optional=optional)


def _fill(rule: Rule, layer: int) -> Rule:
    sources = tuple(
        replace(source, name=source.name.replace("{i}", str(layer))) for source in rule.sources
    )
    return replace(rule, path=rule.path.replace("{i}", str(layer)), sources=sources)


Config = Mapping[str, Any]
RulesFn = Callable[[Config], Table]

_families: dict[str, RulesFn] = {}

OUT_OF_SCOPE = (
    "ForConditionalGeneration", "Whisper", "Speech", "Bark", "TTS", "Tts", "Vits", "Musicgen",
    "Vision", "VL", "Llava", "Audio", "Wav2Vec", "Kokoro", "Clip", "CLIP",
)  # fmt: skip


def register_family(architecture: str, rules_fn: RulesFn) -> None:
    """Make checkpoints of an architecture readable. A later call for the same name wins.

    Args:
        architecture: Name in the config's ``architectures``, e.g. "LlamaForCausalLM".
        rules_fn: Gives the table for a config.json.
    """
    _families[architecture] = rules_fn


def table_for(config: Config) -> Table:
    """The table of the config's architecture.

    Raises:
        ValueError: If the architecture is not supported, or the config lacks a value.
    """
    architectures = config.get("architectures") or []
    architecture = architectures[0] if architectures else None
    if architecture in _families:
        try:
            return _families[architecture](config)
        except KeyError as error:
            raise ValueError(f"config.json of a {architecture} lacks {error}") from None
    raise ValueError(_unsupported(architecture, "auto_map" in config))


def _unsupported(architecture: str | None, has_remote_code: bool) -> str:
    supported = ", ".join(sorted(_families))
    if architecture is None:
        return f'config.json names no model in "architectures"; supported: {supported}'
    reason = f"the architecture {architecture} is not supported; supported: {supported}"
    if any(word in architecture for word in OUT_OF_SCOPE):
        reason = (
            f"{architecture} is a multimodal, speech or text-to-speech architecture: these are "
            f"out of scope, only text models are served. Supported: {supported}"
        )
    if has_remote_code:
        reason += ". The model brings its own code (auto_map), which is never run"
    return reason
