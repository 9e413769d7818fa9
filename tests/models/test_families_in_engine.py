"""Families through the engine: the paged cache, chunks, preemption, devices that share a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import hf_logits, run_on_virtual_devices, save_tiny_model
from tests.models.engine_cases import DEFAULT_CASES, ENGINE_CASES
from tests.models.engine_run import MESHES, PROMPTS
from tests.models.family_cases import CASES
from tests.models.numpy_cases import TINY
from tests.models.numpy_models import MODELS, save_numpy_model

Logits = Callable[[list[int]], np.ndarray]


def save_case(directory: Path, case: str) -> Logits:
    """Save a tiny model; return what gives the logits [T, V] of a whole text, without a cache."""
    directory.mkdir()
    if case in CASES:
        family, overrides = CASES[case]
        model = save_tiny_model(directory, family, **overrides)
        return lambda tokens: hf_logits(model, tokens)
    architecture, config = TINY[case]
    tensors = save_numpy_model(directory, architecture, config)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    return lambda tokens: MODELS[architecture].logits(config, wide, tokens)


def run_cases(directory: Path, *cases: str) -> tuple[dict[str, Any], dict[str, Logits]]:
    """What the engine gives for some cases, all in one process, and what knows better."""
    folders = {case: directory / str(number) for number, case in enumerate(cases)}
    logits = {case: save_case(folder, case) for case, folder in folders.items()}
    found = run_on_virtual_devices("tests.models.engine_run", *folders.values(), unoptimised=True)
    return {case: found[str(folder)] for case, folder in folders.items()}, logits


def assert_most_likely(found: dict[str, Any], logits_of: Logits) -> None:
    """Each token is the most likely one behind the others, and as likely as it is said to be."""
    for prompt, tokens, logprobs in zip(PROMPTS, found["tokens"], found["logprobs"], strict=True):
        logits = logits_of([*prompt, *tokens])[len(prompt) - 1 : -1].astype(np.float64)
        assert tokens == logits.argmax(1).tolist()
        expected = logits.max(1) - np.log(np.exp(logits).sum(1))
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    assert found["num_preemptions"] > 0


@pytest.fixture(scope="module")
def default_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_cases(tmp_path_factory.mktemp("families"), *DEFAULT_CASES)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", DEFAULT_CASES)
def test_the_engine_gives_the_tokens_of_a_whole_prefill(
    default_results: tuple[dict, dict], case: str, mesh: str
) -> None:
    found, logits = default_results
    assert_most_likely(found[case][mesh], logits[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ENGINE_CASES if case not in DEFAULT_CASES])
def test_the_engine_gives_the_tokens_of_a_whole_prefill_of_every_family(
    tmp_path: Path, case: str
) -> None:
    found, logits = run_cases(tmp_path, case)
    for mesh in MESHES:
        assert_most_likely(found[case][mesh], logits[case])
