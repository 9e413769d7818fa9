"""What ops take beside plain arrays: norms, sums that are yet to be taken, attention's options."""

import dataclasses
from typing import Any

import jax

NORM_KINDS = ("rms", "layer")
_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm over the last axis, or over the head dimension of each head.

    "rms": ``x / rms(x)``, cast, times weight (Llama); with an offset times ``offset + weight`` in
    float32 before the cast (Gemma). "layer": ``(x - mean) / deviation * (offset + weight) + bias``,
    all in float32 before the cast.

    Attributes:
        weight: [D], or of heads [H], or [N, H] with one for each; None for none.
        bias: Like the weight; None for none.
        eps: Static. Added to the mean square, or to the variance.
        kind: Static. One of ``NORM_KINDS``.
        offset: Static. Added to the weight.
    """

    weight: jax.Array | None
    bias: jax.Array | None = None
    eps: float = dataclasses.field(default=1e-6, metadata=_STATIC)
    kind: str = dataclasses.field(default="rms", metadata=_STATIC)
    offset: float = dataclasses.field(default=0.0, metadata=_STATIC)

    def __post_init__(self) -> None:
        """Refuse a kind that nobody computes."""
        if self.kind not in NORM_KINDS:
            raise ValueError(f"norm {self.kind!r} is not one of {', '.join(NORM_KINDS)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Addends:
    """Arrays that are yet to be added up, by whoever reads them: in float32, rounded once.

    They are a product's parts (``split_product``), or of several products that go into one sum,
    as attention's and the feed-forward layer's of a parallel residual.

    Attributes:
        arrays: [S_i, T, *shape] each, in float32 or the type of the activations.
        bias: [*shape], the same on all shards; added once, after the sum over shards.
    """

    arrays: tuple[jax.Array, ...]
    bias: jax.Array | None = None

    def __add__(self, other: "Addends") -> "Addends":
        """Both sums together."""
        biases = [bias for bias in (self.bias, other.bias) if bias is not None]
        bias = biases[0] + biases[1] if len(biases) == 2 else next(iter(biases), None)
        return Addends(self.arrays + other.arrays, bias)

    @property
    def num_rows(self) -> int:
        """T."""
        return self.arrays[0].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sum: [T, *shape]."""
        return self.arrays[0].shape[1:]


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How scores are made. Static: it is part of a kernel.

    Attributes:
        scale: Factor on q . k.
        sliding_window: A query at position p sees keys in (p - sliding_window, p]; None for all.
        logits_soft_cap: Scores become cap * tanh(score / cap), after ``scale``; None for no cap.
    """

    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; use None for no window")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap is {self.logits_soft_cap}; use None for no cap")
