"""What the engine decides about a model, rather than its checkpoint."""

import dataclasses

from jaxengine.batch import CachePlace
from jaxengine.pallas_kernels.target import Target


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What the engine decides about a model, rather than its checkpoint.

    Attributes:
        max_model_len: Longest sequence, in tokens; some rope types depend on it.
        target: What the model runs on.
        layers: The layers this pipeline stage holds; None for all of them.
        cache_places: Where each of those has its keys and values, None for one without attention;
            () gives each layer a cache of its own.
        num_shards: Tensor-parallel size.
        attention_backend: Kernel to use; None for the best one.
        input_major: How the weights of matrix products lie in memory, see ``Linear``.
    """

    max_model_len: int
    target: Target
    layers: range | None = None
    cache_places: tuple[CachePlace | None, ...] = ()
    num_shards: int = 1
    attention_backend: str | None = None
    input_major: bool = False
