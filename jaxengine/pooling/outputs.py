"""What a caller of a pooling model gets back: the names and fields of vLLM's outputs."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class PoolingOutput:
    """What ``LLM.encode`` makes of a sequence.

    Attributes:
        data: Float32 numpy array: [D] of an embedding, [tokens, D] of its tokens, [labels].
    """

    data: Any


@dataclass(slots=True)
class EmbeddingOutput:
    """An embedding."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """A probability for each label, in the order of the model's ``id2label``."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    """How well a pair of texts fits together: larger is better."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput:
    """A finished request of a pooling model.

    Attributes:
        request_id: Its name.
        outputs: What was made of it.
        prompt_token_ids: What the model has read; of a pair of embeddings the first, then the
            second.
        finished: True.
        num_cached_tokens: 0: nothing of a pooling model is cached.
    """

    request_id: str
    outputs: Any
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True)
class EmbeddingRequestOutput(PoolingRequestOutput):
    """A request of ``LLM.embed``; ``outputs`` is an ``EmbeddingOutput``."""

    outputs: EmbeddingOutput


@dataclass(slots=True)
class ClassificationRequestOutput(PoolingRequestOutput):
    """A request of ``LLM.classify``; ``outputs`` is a ``ClassificationOutput``."""

    outputs: ClassificationOutput


@dataclass(slots=True)
class ScoringRequestOutput(PoolingRequestOutput):
    """A request of ``LLM.score``; ``outputs`` is a ``ScoringOutput``."""

    outputs: ScoringOutput
