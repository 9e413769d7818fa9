"""Where research code looks into a model: named points whose values it sees, and may replace."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True, eq=False)
class Taps:
    """What a model tells, while it is traced, of every point that it passes.

    Attributes:
        see: Takes a point's name and value, and returns the value to go on with.
        prefix: Of the names.
    """

    see: Callable[[str, jax.Array], jax.Array]
    prefix: str = ""

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Pass a point; returns the value to go on with."""
        return self.see(self.prefix + name, value)

    def within(self, part: str) -> "Taps":
        """Return taps whose names begin with ``part`` and a dot."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{part}.")


def tap(taps: Taps | None, name: str, value: jax.Array) -> jax.Array:
    """Pass a point where somebody may look, or nobody does."""
    return value if taps is None else taps(name, value)
