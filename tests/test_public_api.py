"""What users write: names, arguments and commands that must not change by accident."""

import dataclasses
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import jaxengine

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


def test_the_package_offers_these_names() -> None:
    assert set(jaxengine.__all__) == {
        *("LLM", "SamplingParams", "EngineConfig", "ModelRegistry", "RequestOutputKind"),
        *("RequestOutput", "CompletionOutput", "Logprob", "FlatLogprobs", "LLMEngine"),
        *(
            "StructuredOutputsParams",
            "BeamSearchParams",
            "EngineArgs",
            "TextPrompt",
            "TokensPrompt",
        ),
        *("AsyncLLM", "AsyncLLMEngine", "AsyncEngineArgs"),
        *("PoolingParams", "PoolingOutput", "PoolingRequestOutput"),
        *("EmbeddingOutput", "EmbeddingRequestOutput", "ScoringOutput", "ScoringRequestOutput"),
        *("ClassificationOutput", "ClassificationRequestOutput"),
        "__version__",
    }


@pytest.mark.parametrize("name", jaxengine.__all__)
def test_every_name_offered_is_there(name: str) -> None:
    assert getattr(jaxengine, name).__doc__


def test_the_names_offered_are_those_that_a_prompt_completes() -> None:
    assert set(dir(jaxengine)) == set(jaxengine.__all__)


def test_a_name_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        jaxengine.LLMs  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert jaxengine.__version__ == PROJECT["version"]


def test_a_model_is_loaded_with_vllms_arguments() -> None:
    assert parameters(jaxengine.LLM.__init__) == ["model", "tokenizer", "engine_args"]
    fields = {field.name: field.default for field in dataclasses.fields(jaxengine.EngineConfig)}
    defaults = {
        "dtype": "auto",
        "seed": 0,
        "max_model_len": None,
        "block_size": 16,
        "gpu_memory_utilization": 0.9,
        "max_num_seqs": None,
        "max_num_batched_tokens": None,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "load_format": "auto",
        "trust_remote_code": False,
    }
    assert {name: fields[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("method", "leading"),
    [
        ("generate", ["prompts", "sampling_params"]),
        ("chat", ["messages", "sampling_params"]),
        ("stream", ["prompt", "sampling_params"]),
        ("get_tokenizer", []),
        ("get_default_sampling_params", []),
    ],
)
def test_a_model_answers_to_vllms_methods(method: str, leading: list[str]) -> None:
    assert parameters(getattr(jaxengine.LLM, method))[: len(leading)] == leading


def test_sampling_defaults_are_vllms() -> None:
    params = jaxengine.SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 16, 0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.seed, params.stop, params.logprobs) == (None, [], None)


def test_outputs_have_vllms_fields() -> None:
    request = {field.name for field in dataclasses.fields(jaxengine.RequestOutput)}
    completion = {field.name for field in dataclasses.fields(jaxengine.CompletionOutput)}
    assert request >= {"request_id", "prompt", "prompt_token_ids", "outputs", "finished"}
    assert completion >= {"index", "text", "token_ids", "finish_reason", "stop_reason"}


def test_every_command_of_the_package_can_be_called() -> None:
    assert set(PROJECT["scripts"]) == {"jaxengine", "jaxengine-convert"}
    for location in PROJECT["scripts"].values():
        module, function = location.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_torch_is_no_runtime_dependency() -> None:
    names = [requirement.split(">")[0].split("=")[0] for requirement in PROJECT["dependencies"]]
    assert "torch" not in names
