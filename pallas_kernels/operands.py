"""What several ops take beside plain arrays: sums that are due, norms, options of attention."""

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis.

    "rms" (arXiv:1910.07467): ``x / sqrt(mean(x^2) + eps) * weight``. "layer" (arXiv:1607.06450):
    ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``. In float32; the rms norm is rounded
    before the product with the weight, as Hugging Face's Llama has it, unless there is an offset:
    then the weight is ``offset + weight``, and rounding comes last, as its Gemma has it.

    Attributes:
        weight: [D], or with leading axes where heads have weights of their own; None for 1.
        bias: Likewise; None for 0.
        eps: Added to the mean square or the variance.
        kind: Which of the two.
        offset: Added to the weight.
    """

    weight: Array | None
    bias: Array | None
    eps: float = dataclasses.field(metadata={"static": True})
    kind: Literal["rms", "layer"] = dataclasses.field(default="rms", metadata={"static": True})
    offset: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def is_plain(self) -> bool:
        """Whether it is the norm that every kernel serves: rms, one weight, no offset or bias."""
        has_weight = self.weight is not None and self.weight.ndim == 1
        return self.kind == "rms" and has_weight and self.bias is None and self.offset == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Addends:
    """A sum that is due: whoever reads it adds it up, in float32, and rounds once.

    Attributes:
        arrays: [S, T, ...] each, with S parts of a product, in float32 or the activations' dtype.
            Those of all shards count.
        bias: [...], the same on all shards and added once; None for none.
    """

    arrays: tuple[Float[Array, "S T *shape"], ...]
    bias: Float[Array, "*shape"] | None = None

    def __add__(self, other: "Addends") -> "Addends":
        """Both sums together."""
        bias = other.bias if self.bias is None else self.bias
        if self.bias is not None and other.bias is not None:
            bias = self.bias + other.bias
        return Addends(self.arrays + other.arrays, bias)

    @property
    def is_single(self) -> bool:
        """Whether it is one product without a bias."""
        return len(self.arrays) == 1 and self.bias is None


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How scores are made of queries and keys.

    Attributes:
        scale: Factor on q . k.
        sliding_window: A query at position p sees keys in (p - sliding_window, p]; None for all.
        logits_soft_cap: Scores become cap * tanh(score / cap), after ``scale``; None for no cap.
    """

    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
