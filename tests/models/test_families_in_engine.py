"""Families through the engine: the paged cache, chunks, preemption, devices that share a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import hf_greedy, run_on_virtual_devices, save_tiny_model
from tests.models.engine_cases import DEFAULT_CASES, ENGINE_CASES
from tests.models.engine_run import MESHES, NUM_TOKENS, PROMPTS
from tests.models.family_cases import CASES
from tests.models.numpy_cases import TINY
from tests.models.numpy_models import MODELS, save_numpy_model

Greedy = Callable[[list[int]], list[int]]


def save_case(directory: Path, case: str) -> Greedy:
    """Save a tiny model; return what continues a prompt without a cache or a step of ours."""
    if case in CASES:
        family, overrides = CASES[case]
        model = save_tiny_model(directory, family, **overrides)
        return lambda prompt: hf_greedy(model, prompt, NUM_TOKENS)
    architecture, config = TINY[case]
    tensors = save_numpy_model(directory, architecture, config)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def continued(prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NUM_TOKENS):
            tokens.append(int(MODELS[architecture].logits(config, wide, tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    return continued


def run_cases(directory: Path, *cases: str) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """What the engine gives for some cases, all in one process, and what is expected."""
    folders = {case: directory / str(number) for number, case in enumerate(cases)}
    for folder in folders.values():
        folder.mkdir()
    expected = {
        case: [save_case(folder, case)(prompt) for prompt in PROMPTS]
        for case, folder in folders.items()
    }
    found = run_on_virtual_devices("tests.models.engine_run", *folders.values(), unoptimised=True)
    return {case: found[str(folder)] for case, folder in folders.items()}, expected


@pytest.fixture(scope="module")
def default_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_cases(tmp_path_factory.mktemp("families"), *DEFAULT_CASES)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", DEFAULT_CASES)
def test_the_engine_gives_the_tokens_of_a_whole_prefill(
    default_results: tuple[dict, dict], case: str, mesh: str
) -> None:
    found, expected = default_results
    assert found[case][mesh]["tokens"] == expected[case]
    assert found[case][mesh]["num_preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ENGINE_CASES if case not in DEFAULT_CASES])
def test_the_engine_gives_the_tokens_of_a_whole_prefill_of_every_family(
    tmp_path: Path, case: str
) -> None:
    found, expected = run_cases(tmp_path, case)
    assert {mesh: found[case][mesh]["tokens"] for mesh in MESHES} == dict.fromkeys(
        MESHES, expected[case]
    )
    assert all(found[case][mesh]["num_preemptions"] > 0 for mesh in MESHES)
