"""New weights for an engine that runs: all or some, checked whole before the first is placed."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxengine.convert.parameters import Parameter, parameters
from jaxengine.engine.device.stage import Stage
from jaxengine.research.checkpoint_arrays import parameters_of_arrays
from jaxengine.weights import ParamSpec, open_model, place

NewWeights = str | os.PathLike[str] | Mapping[str, Any] | Iterable[tuple[str, Any]]
# Brings one parameter to a stage's devices.
Placing = Callable[[Stage], jax.Array]


def update_stages(
    replicas: Sequence[Sequence[Stage]], hf_config: Mapping[str, Any], new: NewWeights
) -> list[str]:
    """Replace weights, one parameter after the other, so that one fits beside the old ones.

    Args:
        replicas: The stages of each, awake, between two steps.
        hf_config: The model's config.json.
        new: A directory or file of weights, for all of them; a mapping under our dotted paths with
            the shapes of the engine's arrays; or a mapping or pairs under a checkpoint's names.

    Returns:
        Paths of what was replaced.

    Raises:
        ValueError: If a name is not the model's or a shape does not fit; nothing has changed then.
    """
    placings = _placings(replicas[0], hf_config, new)
    if not placings:
        raise ValueError("no weights are given: nothing has changed")
    for stage in (stage for stages in replicas for stage in stages):
        stage.replace_weights(_placed(stage, placings))
    return list(placings)


def _placed(stage: Stage, placings: Mapping[str, Placing]) -> Iterator[tuple[str, jax.Array]]:
    for path, placing in placings.items():
        if path in stage.parts.specs:
            yield path, placing(stage)


def _placings(
    stages: Sequence[Stage], hf_config: Mapping[str, Any], new: NewWeights
) -> dict[str, Placing]:
    specs = {path: spec for stage in stages for path, spec in stage.parts.specs.items()}
    if isinstance(new, str | os.PathLike):
        sources = _of_checkpoint(Path(new), hf_config)
    else:
        pairs = list(new.items()) if isinstance(new, Mapping) else list(new)
        if pairs and all(name in specs for name, _ in pairs):
            return {path: _of_tree(path, value, specs[path]) for path, value in pairs}
        current = {path: array for stage in stages for path, array in stage.params.items()}
        sources = parameters_of_arrays(pairs, hf_config, current, specs)
    for source in sources:
        if source.path in specs and source.shape != specs[source.path].checkpoint_shape:
            raise ValueError(
                f"{source.path} has shape {source.shape}, expected "
                f"{specs[source.path].checkpoint_shape}; nothing has changed"
            )
    return {source.path: _of_source(source) for source in sources if source.path in specs}


def _of_checkpoint(source: Path, hf_config: Mapping[str, Any]) -> list[Parameter]:
    checkpoint = open_model(source)
    theirs, ours = checkpoint.hf_config.get("architectures"), hf_config.get("architectures")
    if theirs != ours:
        raise ValueError(f"{source} holds {theirs}, expected {ours}; nothing has changed")
    return list(parameters(checkpoint))


def _of_source(source: Parameter) -> Placing:
    return lambda stage: place(source, stage.parts.specs[source.path], stage.parts.mesh)


def _of_tree(path: str, value: Any, spec: ParamSpec) -> Placing:
    """An array that is shaped as the engine's is, such as an optimiser's."""
    if tuple(value.shape) != spec.shape:
        raise ValueError(
            f"{path} has shape {tuple(value.shape)}, expected {spec.shape}; nothing has changed"
        )

    def placing(stage: Stage) -> jax.Array:
        sharding = NamedSharding(stage.parts.mesh, spec.spec)
        # Copied: what the caller goes on to donate is not the engine's.
        return jax.device_put(jnp.array(value, spec.dtype), sharding)

    return placing
