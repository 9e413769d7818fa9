"""Call sequences of libraries that use vLLM, through modules of its name.

Each test makes the calls of one library, in its order and with its arguments, without the library.
"""

import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine.compat.vllm_modules import MODULES, install, uninstall
from tests.helpers import hf_logits, random_prompts

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "disable_log_stats": True}


@pytest.fixture(scope="module", autouse=True)
def vllm() -> Iterator[None]:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM itself is installed")
    install()
    yield
    uninstall()


def test_every_module_of_the_table_can_be_imported_and_has_a_version() -> None:
    for name, attributes in MODULES.items():
        module = importlib.import_module(name)
        assert all(hasattr(module, attribute) for attribute in attributes)
    assert importlib.metadata.version("vllm") == importlib.import_module("vllm").__version__
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vllm.worker")


def hf_log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    tokens = context + continuation
    logits = hf_logits(model, tokens).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    positions = range(len(context), len(tokens))
    return float(sum(logprobs[position - 1, tokens[position]] for position in positions))


def test_lm_evaluation_harness_scores_continuations(chat_model: Path, hf_model: Any) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.tokenizers import get_tokenizer

    model = LLM(
        model=str(chat_model),
        gpu_memory_utilization=0.9,
        revision=None,
        dtype="float32",
        tokenizer=None,
        tokenizer_mode="auto",
        tokenizer_revision=None,
        trust_remote_code=False,
        tensor_parallel_size=1,
        max_model_len=128,
        max_num_seqs=4,
        swap_space=4,
        quantization=None,
        seed=1234,
        enable_lora=False,
        max_lora_rank=16,
        num_gpu_blocks_override=65,
        max_num_batched_tokens=16,
    )
    assert model.llm_engine.model_config.max_model_len == 128
    assert get_tokenizer(str(chat_model), tokenizer_mode="auto", trust_remote_code=False)
    contexts, continuations = random_prompts(7, 20, 3), random_prompts(3, 9, 12, seed=1)
    pairs = list(zip(contexts, continuations, strict=True))
    outputs = model.generate(
        [TokensPrompt(prompt_token_ids=context + rest) for context, rest in pairs],
        sampling_params=[
            SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
        ]
        * len(pairs),
        use_tqdm=False,
        lora_request=None,
    )
    for output, (context, rest) in zip(outputs, pairs, strict=True):
        tokens = context + rest
        entries = list(zip(tokens, output.prompt_logprobs, strict=True))[len(context) :]
        found = sum(entry[token].logprob for token, entry in entries)
        assert math.isclose(found, hf_log_likelihood(hf_model, context, rest), abs_tol=1e-3)
    until = SamplingParams(
        max_tokens=8,
        stop=["</s>"],
        temperature=0.0,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )
    (output,) = model.generate(
        [TokensPrompt(prompt_token_ids=pairs[0][0])], sampling_params=[until], use_tqdm=False
    )
    assert isinstance(output.outputs[0].text, str)


def test_langchain_asks_only_for_parameters_that_are_annotated(chat_model: Path) -> None:
    from vllm import LLM, SamplingParams

    client = LLM(
        model=str(chat_model),
        tensor_parallel_size=1,
        trust_remote_code=False,
        dtype="auto",
        download_dir=None,
        **SMALL,
    )
    params = {
        **{"n": 1, "best_of": None, "max_tokens": 5, "top_k": -1, "top_p": 1.0, "temperature": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": None, "ignore_eos": False},
        **{"use_beam_search": False, "logprobs": None},
    }
    known = SamplingParams.__annotations__.keys()
    sampling = SamplingParams(**{key: value for key, value in params.items() if key in known})
    outputs = client.generate(["the quick brown fox", "pages of"], sampling)
    assert [type(output.outputs[0].text) for output in outputs] == [str, str]
    # LlamaIndex gives all of them.
    (output,) = client.generate(["the fox"], SamplingParams(**params))
    assert output.finished


def test_trl_generates_beside_its_training(chat_model: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(
        model=str(chat_model),
        tensor_parallel_size=1,
        gpu_memory_utilization=0.3,
        max_model_len=128,
        max_num_seqs=4,
        enable_sleep_mode=True,
        model_impl="vllm",
        distributed_executor_backend="external_launcher",
        seed=0,
        max_num_batched_tokens=4096,
        logprobs_mode="processed_logprobs",
        quantization=None,
        trust_remote_code=False,
        num_gpu_blocks_override=65,
        disable_log_stats=True,
    )
    sampling = {
        **{"n": 1, "repetition_penalty": 1.0, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        **{"min_p": 0.0, "max_tokens": 4, "logprobs": 0, "seed": 3, "ignore_eos": True},
    }
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(5, 9)]

    def generate() -> list[list[int]]:
        outputs = llm.generate(prompts, sampling_params=SamplingParams(**sampling), use_tqdm=False)
        for output in outputs:
            for entry in output.outputs[0].logprobs:
                ranked = sorted(entry.items(), key=lambda item: item[1].rank)
                assert len(ranked) == 1
                assert -math.inf < ranked[0][1].logprob <= 0
        return [output.outputs[0].token_ids for output in outputs]

    before = generate()
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.wake_up(tags=["kv_cache"])
    assert llm.reset_prefix_cache()
    assert generate() == before
    assert StructuredOutputsParams(regex="a").regex == "a"
