"""Modules of the name ``vllm`` that are made of ours, for libraries that import vLLM themselves.

    import jaxengine.compat.vllm_modules

    jaxengine.compat.vllm_modules.install()
    import lm_eval.models.vllm_causallms  # and whatever else imports vllm

Nothing is patched: a finder behind all others answers for a package that is not installed. Where
vLLM is installed, ``install`` refuses.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jaxengine

VERSION = "0.33.0"  # whose names these are
# Module -> its names, each with where it is found here.
MODULES: dict[str, dict[str, str]] = {
    "vllm": {name: f"jaxengine:{name}" for name in jaxengine.__all__ if not name.startswith("_")},
    "vllm.sampling_params": {
        "SamplingParams": "jaxengine:SamplingParams",
        "RequestOutputKind": "jaxengine:RequestOutputKind",
        "StructuredOutputsParams": "jaxengine:StructuredOutputsParams",
        "GuidedDecodingParams": "jaxengine.structured.params:GuidedDecodingParams",
        "BeamSearchParams": "jaxengine:BeamSearchParams",
    },
    "vllm.outputs": {
        "RequestOutput": "jaxengine:RequestOutput",
        "CompletionOutput": "jaxengine:CompletionOutput",
        "ClassificationOutput": "jaxengine:ClassificationOutput",
        "ClassificationRequestOutput": "jaxengine:ClassificationRequestOutput",
        "EmbeddingOutput": "jaxengine:EmbeddingOutput",
        "EmbeddingRequestOutput": "jaxengine:EmbeddingRequestOutput",
        "PoolingOutput": "jaxengine:PoolingOutput",
        "PoolingRequestOutput": "jaxengine:PoolingRequestOutput",
        "ScoringOutput": "jaxengine:ScoringOutput",
        "ScoringRequestOutput": "jaxengine:ScoringRequestOutput",
    },
    "vllm.pooling_params": {"PoolingParams": "jaxengine:PoolingParams"},
    "vllm.logprobs": {"Logprob": "jaxengine:Logprob", "FlatLogprobs": "jaxengine:FlatLogprobs"},
    "vllm.inputs": {
        "TextPrompt": "jaxengine:TextPrompt",
        "TokensPrompt": "jaxengine:TokensPrompt",
    },
    "vllm.engine": {},
    "vllm.engine.arg_utils": {"EngineArgs": "jaxengine:EngineArgs"},
    "vllm.engine.llm_engine": {"LLMEngine": "jaxengine:LLMEngine"},
    "vllm.entrypoints": {},
    "vllm.entrypoints.llm": {"LLM": "jaxengine:LLM"},
    "vllm.entrypoints.chat_utils": {
        "resolve_hf_chat_template": "jaxengine.compat.vllm_modules:resolve_chat_template"
    },
    "vllm.renderers": {},
    "vllm.renderers.hf": {
        "resolve_chat_template": "jaxengine.compat.vllm_modules:resolve_chat_template"
    },
    "vllm.lora": {},
    "vllm.lora.request": {"LoRARequest": "jaxengine.compat.vllm_modules:LoRARequest"},
    "vllm.tokenizers": {"get_tokenizer": "jaxengine.compat.vllm_modules:get_tokenizer"},
    "vllm.transformers_utils": {},
    "vllm.transformers_utils.tokenizer": {
        "get_tokenizer": "jaxengine.compat.vllm_modules:get_tokenizer"
    },
}


def install() -> None:
    """Answer imports of ``vllm`` from now on; a second call changes nothing.

    Raises:
        ImportError: If vLLM itself is installed.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if importlib.util.find_spec("vllm") is not None:
        raise ImportError("vLLM is installed, and is not to be hidden: use another environment")
    sys.meta_path.append(_Finder())


def uninstall() -> None:
    """Undo ``install``; modules that were imported stay with those who have them."""
    sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, _Finder)]
    for name in [each for each in sys.modules if each in MODULES]:
        del sys.modules[name]


class LoRARequest:
    """Where an adapter lies. There are no adapters yet, so every use of it is refused."""

    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str, **_: Any) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


def get_tokenizer(
    tokenizer_name: str,
    *,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load a Hugging Face tokenizer, never with code of its own."""
    from transformers import AutoTokenizer

    if trust_remote_code or tokenizer_mode not in ("auto", "hf", "slow"):
        raise ValueError("only tokenizers of transformers are loaded, without code of their own")
    return AutoTokenizer.from_pretrained(tokenizer_name, revision=revision, **options)


def resolve_chat_template(
    tokenizer: Any, chat_template: str | None = None, tools: Any = None, **_: Any
) -> str | None:
    """Return the template that a tokenizer would use; None if it has none."""
    try:
        return str(tokenizer.get_chat_template(chat_template, tools=tools))
    except ValueError:
        return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        for name, place in MODULES[module.__name__].items():
            home, _, attribute = place.partition(":")
            setattr(module, name, getattr(importlib.import_module(home), attribute))
        if module.__name__ == "vllm":
            module.__version__ = VERSION  # type: ignore[attr-defined]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context
    ) -> Iterator[importlib.metadata.Distribution]:
        if context.name == "vllm":
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata.version("vllm")`` reads."""

    def read_text(self, filename: str) -> str | None:
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n"
        return metadata if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)
