"""Counts how many experts steps touch, for benchmarks: a mixture's cost depends on it."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class RoutingCounts:
    """What was routed, a layer and step (and device, of experts that are dealt out) at a time."""

    def __init__(self) -> None:
        self._touched: list[int] = []
        self._rows: list[int] = []

    def add(self, touched: np.ndarray, rows: np.ndarray) -> None:
        """Take down one layer of one step."""
        self._touched.append(int(touched))
        self._rows.append(int(rows))

    @property
    def num_layer_steps(self) -> int:
        """How many layers of steps have routed any token."""
        return sum(rows > 0 for rows in self._rows)

    @property
    def mean_touched(self) -> float:
        """Mean number of experts that a layer of a step has read; steps of padding don't count."""
        return sum(self._touched) / max(1, self.num_layer_steps)

    @property
    def mean_rows(self) -> float:
        """Mean number of pairs of token and expert that such a layer has served."""
        return sum(self._rows) / max(1, self.num_layer_steps)


_observers: list[RoutingCounts] = []


@contextlib.contextmanager
def counting_routing() -> Iterator[RoutingCounts]:
    """Count in all programs that are traced meanwhile, for as long as those live.

    They call the host in every layer, and so are slow: time others. Programs kept on disk were
    traced without; let the engine compile its own (``XLA`` cache off).
    """
    counts = RoutingCounts()
    _observers.append(counts)
    try:
        yield counts
        jax.effects_barrier()
    finally:
        _observers.remove(counts)


def report_routing(group_sizes: Int[Array, " E"]) -> None:
    """Tell those who count how many rows each expert has; nothing where nobody does."""
    for counts in _observers:
        touched = jnp.sum(group_sizes > 0, dtype=jnp.int32)
        jax.debug.callback(counts.add, touched, jnp.sum(group_sizes, dtype=jnp.int32))
