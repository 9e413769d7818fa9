"""The programs of examples/ that look into a model, on a tiny one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jaxengine import LLM
from tests.helpers import hf_logits, save_tiny_chat_model, save_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENS = [7, 30, 11, 90, 45]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_logit_lens_ends_with_the_models_own_scores(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path, "Llama")
    llm = LLM(str(tmp_path), skip_tokenizer_init=True, disable_log_stats=True)
    scores = example("logit_lens").logit_lens(llm, TOKENS)
    assert scores.shape == (3, 128)
    np.testing.assert_allclose(scores[-1], hf_logits(hf, TOKENS)[-1], atol=1e-4)
    assert not np.allclose(scores[0], scores[-1], atol=0.1)


def test_saliency_is_gradient_times_input(tmp_path: Path) -> None:
    import torch

    hf = save_tiny_model(tmp_path, "Llama")
    llm = LLM(str(tmp_path), skip_tokenizer_init=True, disable_log_stats=True)
    best, parts = example("saliency").saliency(llm, TOKENS)
    embedding = hf.get_input_embeddings()(torch.tensor([TOKENS])).detach().requires_grad_()
    logits = hf(inputs_embeds=embedding).logits[0, -1]
    assert best == int(logits.argmax())
    torch.log_softmax(logits, -1)[best].backward()
    expected = (embedding.grad * embedding).sum(-1)[0].detach().numpy()
    np.testing.assert_allclose(parts, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["logit_lens", "saliency"])
def test_an_example_runs_as_a_program(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_tiny_chat_model(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(directory), "the quick brown fox"])
    module = example(name)
    monkeypatch.setattr(module, "LLM", lambda **options: LLM(**{**options, "max_model_len": 256}))
    module.main()
    assert len(capsys.readouterr().out.splitlines()) >= 3
