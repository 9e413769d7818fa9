"""What a caller may ask of a pooling model. Standard library only."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PoolingParams:
    """What is returned of a sequence.

    Attributes:
        dimensions: Leading numbers of an embedding to keep (Matryoshka, arXiv:2205.13147); None
            for all. The rest is normalised anew.
        use_activation: Whether embeddings are brought to length 1, and scores of labels to
            probabilities; None for what the model says.
        normalize: Former name of it for embeddings.
        softmax: Former name of it for labels.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    softmax: bool | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        size = self.dimensions
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"dimensions is {size!r}: a positive integer is needed")
        for name in ("use_activation", "normalize", "softmax"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use True, False or None")

    @property
    def activates(self) -> bool | None:
        """``use_activation`` under any of its names."""
        names = (self.use_activation, self.normalize, self.softmax)
        return next((value for value in names if value is not None), None)
