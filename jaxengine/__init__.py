"""LLM inference in JAX: ``from jaxengine import LLM, SamplingParams``.

Names are imported when they are first used (PEP 562), so that what needs no jax does not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxengine.checkout import find_packages_beside

if TYPE_CHECKING:
    from jaxengine.async_llm import AsyncEngineArgs, AsyncLLM, AsyncLLMEngine
    from jaxengine.beam_search import BeamSearchParams
    from jaxengine.config import EngineConfig
    from jaxengine.llm import LLM
    from jaxengine.llm_engine import EngineArgs, LLMEngine
    from jaxengine.models.registry import ModelRegistry
    from jaxengine.outputs import CompletionOutput, FlatLogprobs, Logprob, RequestOutput
    from jaxengine.pooling.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from jaxengine.pooling.params import PoolingParams
    from jaxengine.sampling_params import RequestOutputKind, SamplingParams
    from jaxengine.structured.params import StructuredOutputsParams
    from jaxengine.text.prompts import TextPrompt, TokensPrompt

__version__ = "0.1.0"

find_packages_beside()

_HOMES = {
    "LLM": "llm",
    "LLMEngine": "llm_engine",
    "EngineArgs": "llm_engine",
    "BeamSearchParams": "beam_search",
    "TextPrompt": "text.prompts",
    "TokensPrompt": "text.prompts",
    "FlatLogprobs": "outputs",
    "AsyncLLM": "async_llm",
    "AsyncLLMEngine": "async_llm",
    "AsyncEngineArgs": "async_llm",
    "EngineConfig": "config",
    "ModelRegistry": "models.registry",
    "SamplingParams": "sampling_params",
    "RequestOutputKind": "sampling_params",
    "StructuredOutputsParams": "structured.params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "PoolingParams": "pooling.params",
    "ClassificationOutput": "pooling.outputs",
    "ClassificationRequestOutput": "pooling.outputs",
    "EmbeddingOutput": "pooling.outputs",
    "EmbeddingRequestOutput": "pooling.outputs",
    "PoolingOutput": "pooling.outputs",
    "PoolingRequestOutput": "pooling.outputs",
    "ScoringOutput": "pooling.outputs",
    "ScoringRequestOutput": "pooling.outputs",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "FlatLogprobs",
    "LLMEngine",
    "Logprob",
    "ModelRegistry",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxengine' has no attribute {name!r}")
    return getattr(import_module(f"jaxengine.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
