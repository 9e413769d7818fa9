"""From the vector that the model has pooled to what a caller gets, in float32 on the host.

Each vector goes through on its own, so that none depends on the others of its batch.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxengine.convert.errors import shown
from jaxengine.convert.json_file import read_json
from jaxengine.convert.safetensors_file import open_safetensors
from jaxengine.convert.tensors import read
from jaxengine.pooling.params import PoolingParams

KINDS = ("cls", "mean", "last", "max")
# Names of sentence-transformers' classes end so.
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: sigmoid(x),
}


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling: ``act(W x + b)``, with W of shape [out, in]."""

    weight: np.ndarray
    bias: np.ndarray | None
    activation: str

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Multiply one vector."""
        y = self.weight @ x
        y = y if self.bias is None else y + self.bias
        return np.asarray(_ACTIVATIONS[self.activation](y), np.float32)


@dataclasses.dataclass(frozen=True)
class Pooler:
    """How a sequence becomes an embedding.

    Attributes:
        kind: "cls" (first token), "last", "mean" or "max" of its tokens.
        normalizes: Whether embeddings are brought to length 1.
        dense: Layers between.
        max_seq_length: Longest sequence that the embedding was made for, in tokens; None for the
            model's.
        lowers_case: Whether texts are to be in lower case.
        matryoshka: Dimensions that embeddings may be cut to: all if True, none if False.
    """

    kind: str = "cls"
    normalizes: bool = True
    dense: tuple[Dense, ...] = ()
    max_seq_length: int | None = None
    lowers_case: bool = False
    matryoshka: bool | tuple[int, ...] = False

    def embedding(self, pooled: np.ndarray, params: PoolingParams) -> np.ndarray:
        """Make an embedding.

        Args:
            pooled: [D] in float32.
            params: From the caller, checked.
        """
        for layer in self.dense:
            pooled = layer(pooled)
        if params.dimensions is not None:
            pooled = pooled[: params.dimensions]
        normalizes = self.normalizes if params.activates is None else params.activates
        return unit(pooled) if normalizes else pooled

    def size(self, hidden_size: int) -> int:
        """How many numbers a whole embedding has."""
        return len(self.dense[-1].weight) if self.dense else hidden_size

    def check_dimensions(self, params: PoolingParams, hidden_size: int) -> None:
        """Refuse to cut what was not trained for it.

        Raises:
            ValueError: Naming the dimensions that are possible.
        """
        wanted, size = params.dimensions, self.size(hidden_size)
        if wanted is None:
            return
        if self.matryoshka is False:
            raise ValueError(
                f"dimensions={wanted} is not supported: this model's embeddings of {size} numbers "
                "were not trained to be cut. If they were, load it with "
                "hf_overrides={'is_matryoshka': True}"
            )
        possible = isinstance(self.matryoshka, bool) or wanted in self.matryoshka
        if wanted > size or not possible:
            choices = f"1 to {size}" if self.matryoshka is True else str(list(self.matryoshka))
            raise ValueError(f"dimensions={wanted} is not possible: this model has {choices}")


def unit(x: np.ndarray) -> np.ndarray:
    """The vector at length 1; zeros stay zeros."""
    return np.asarray(x / max(float(np.sqrt(np.sum(np.square(x)))), 1e-12), np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) over its sum."""
    powers = np.exp(x - x.max())
    return np.asarray(powers / powers.sum(), np.float32)


def probabilities(logits: np.ndarray, hf_config: Mapping[str, Any]) -> np.ndarray:
    """What a classifier's scores [labels] become, as its config says.

    A cross-encoder names its activation; a multi-label classifier has sigmoids, a regression its
    plain scores; else one label has a sigmoid and several a softmax.

    Raises:
        ValueError: If the activation named is none of those known.
    """
    sentence = hf_config.get("sentence_transformers")
    name = sentence.get("activation_fn") if isinstance(sentence, Mapping) else None
    name = name or hf_config.get("sbert_ce_default_activation_function")
    if name is not None:
        return np.asarray(_ACTIVATIONS[_activation(name, "config.json")](logits), np.float32)
    problem = hf_config.get("problem_type")
    if problem == "regression":
        return logits
    is_single = problem != "multi_label_classification" and len(logits) > 1
    return softmax(logits) if is_single else sigmoid(logits)


def read_pooler(
    directory: Path, hf_config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Pooler:
    """Read what sentence-transformers' files beside the weights say; without them: cls, length 1.

    Args:
        directory: Of the model.
        hf_config: Content of config.json.
        overrides: ``pooler_config``: ``pooling_type`` (or ``seq_pooling_type``), ``normalize`` (or
            ``use_activation``).

    Raises:
        ValueError: If a file is damaged, or asks for what is not there.
    """
    pooler = Pooler(matryoshka=_matryoshka(hf_config))
    if (directory / "modules.json").is_file():
        pooler = _of_modules(directory, pooler)
    if (directory / "sentence_bert_config.json").is_file():
        found = read_json(directory / "sentence_bert_config.json")
        length = found.get("max_seq_length")
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(
                f"{directory / 'sentence_bert_config.json'} has max_seq_length={shown(length)}: a "
                "positive integer is needed"
            )
        lowers = bool(found.get("do_lower_case", False))
        pooler = dataclasses.replace(pooler, max_seq_length=length, lowers_case=lowers)
    return _overridden(pooler, overrides)


def _matryoshka(hf_config: Mapping[str, Any]) -> bool | tuple[int, ...]:
    listed = hf_config.get("matryoshka_dimensions")
    if isinstance(listed, list | tuple) and listed:
        return tuple(int(size) for size in listed)
    return bool(hf_config.get("is_matryoshka", False))


def _of_modules(directory: Path, pooler: Pooler) -> Pooler:
    kind, normalizes, dense = "cls", False, []
    for folder, name in _modules(directory / "modules.json"):
        if name == "Pooling":
            kind = _pooling_kind(directory / folder / "config.json")
        elif name == "Normalize":
            normalizes = True
        elif name == "Dense":
            dense.append(_dense(directory / folder))
        elif name != "Transformer":
            raise ValueError(
                f"{directory / 'modules.json'} has the module {shown(name)}: Transformer, Pooling, "
                "Dense and Normalize are known"
            )
    return dataclasses.replace(pooler, kind=kind, normalizes=normalizes, dense=tuple(dense))


def _modules(file: Path) -> list[tuple[str, str]]:
    """The folder and the class of each module, in their order."""
    modules = _json_list(file)
    try:
        return [(each["path"], each["type"].rpartition(".")[2]) for each in modules]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: it lists no modules with path and type") from None


def _json_list(file: Path) -> list[Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Fetch it again") from None
    if not isinstance(found, list):
        raise ValueError(f"{file} is damaged: a list is expected, found {shown(found)}")
    return found


_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


def _pooling_kind(file: Path) -> str:
    found = read_json(file)
    modes = [name for name, value in found.items() if name.startswith("pooling_mode_") and value]
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    mode = found.get("pooling_mode")  # as new versions write it
    if not modes and mode in ("cls", "mean", "max", "lasttoken"):
        return {"lasttoken": "last"}.get(mode, mode)
    raise ValueError(
        f"{file} asks for the pooling {shown(modes or mode)}: one of {', '.join(_MODES)} is "
        "supported; choose one with pooler_config={'pooling_type': ...}"
    )


def _dense(directory: Path) -> Dense:
    config = read_json(directory / "config.json")
    file = directory / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} is missing: the model's modules.json needs it; fetch it again")
    tensors = open_safetensors(file)
    weight = tensors.get("linear.weight")
    if weight is None or len(weight.shape) != 2:
        raise ValueError(f"{file} holds no matrix linear.weight: it is damaged, fetch it again")
    bias = tensors.get("linear.bias")
    return Dense(
        np.asarray(read(weight), np.float32),
        None if bias is None else np.asarray(read(bias), np.float32),
        _activation(config.get("activation_function", "Tanh"), str(directory / "config.json")),
    )


def _activation(name: Any, where: str) -> str:
    found = str(name).rpartition(".")[2].removesuffix("()")
    if found not in _ACTIVATIONS:
        raise ValueError(
            f"{where} has the activation {shown(name)}: use one of {', '.join(_ACTIVATIONS)}"
        )
    return found


def _overridden(pooler: Pooler, overrides: Mapping[str, Any]) -> Pooler:
    known = ("pooling_type", "seq_pooling_type", "normalize", "use_activation")
    for name in overrides.keys() - set(known):
        raise ValueError(f"pooler_config has no {name!r}: use {', '.join(known)}")
    kind = overrides.get("pooling_type") or overrides.get("seq_pooling_type")
    if kind is not None:
        if str(kind).lower() not in KINDS:
            raise ValueError(f"pooling_type is {kind!r}: use one of {', '.join(KINDS)}")
        pooler = dataclasses.replace(pooler, kind=str(kind).lower())
    for name in ("normalize", "use_activation"):
        if overrides.get(name) is not None:
            pooler = dataclasses.replace(pooler, normalizes=bool(overrides[name]))
    return pooler
