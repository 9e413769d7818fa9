"""Gives an engine's device memory back for a while, and takes it again."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxengine.engine.device.stage import Stage
from jaxengine.engine.device.step import StageParts

HostParams = dict[str, np.ndarray]
LoadParams = Callable[[StageParts], dict[str, jax.Array]]


class SleepingStages:
    """Stages without weights and caches on their devices; compiled programs stay.

    Args:
        stages: Of all replicas; nothing may run on them.
        keeps_weights: Whether the weights wait in the host's memory, or are loaded anew.
    """

    def __init__(self, stages: Sequence[Stage], *, keeps_weights: bool) -> None:
        self._stages = list(stages)
        self._weights: list[HostParams | None] = []
        for stage in self._stages:
            params = stage.release()
            kept = {path: np.asarray(array) for path, array in params.items()}
            self._weights.append(kept if keeps_weights else None)
            for array in params.values():
                array.delete()

    def wake_up(self, load: LoadParams) -> None:
        """Bring weights and caches back.

        Args:
            load: Loads a stage's weights, if they were not kept.
        """
        for stage, weights in zip(self._stages, self._weights, strict=True):
            stage.start(load(stage.parts) if weights is None else _placed(stage.parts, weights))


def _placed(parts: StageParts, weights: HostParams) -> dict[str, jax.Array]:
    return {
        path: jax.device_put(array, NamedSharding(parts.mesh, parts.specs[path].spec))
        for path, array in weights.items()
    }
