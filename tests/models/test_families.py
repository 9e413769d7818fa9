"""Every family equals its class in transformers, or a plain numpy version of it, in float32."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import hf_logits, our_logits, save_tiny_model
from tests.models.family_cases import CASES
from tests.models.numpy_cases import TINY
from tests.models.numpy_models import MODELS, save_numpy_model

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 128, 90)]
# Where the length that is served decides about the rotary embedding.
MAX_MODEL_LEN = {"phi3 of short texts": 128, "phimoe of short texts": 128}
FIRST_CASES = {family: case for case, (family, _) in reversed(CASES.items())}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if FIRST_CASES[family] == case else pytest.mark.slow)
        for case, (family, _) in CASES.items()
    ],
)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    model = save_tiny_model(tmp_path, family, **overrides)
    ours = our_logits(
        tmp_path,
        TOKENS,
        max_model_len=MAX_MODEL_LEN.get(case, 256),
        attention_backend="reference",
    )
    assert np.abs(ours - hf_logits(model, TOKENS)).max() < 1e-4


# Llama under another name: their names are held beside, their logits only among the slow ones.
LLAMAS = ("aquila", "xverse", "yi", "internlm3")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in LLAMAS else ()) for case in TINY]
)
def test_logits_equal_those_of_a_plain_version(case: str, tmp_path: Path) -> None:
    architecture, config = TINY[case]
    tensors = save_numpy_model(tmp_path, architecture, config)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    expected = MODELS[architecture].logits(config, wide, TOKENS)
    ours = our_logits(tmp_path, TOKENS, attention_backend="reference")
    assert np.abs(ours - expected).max() < 1e-4
