"""A step whose last layer serves the rows' last tokens alone equals one that serves all tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import LLM
from jaxengine.batch import StepShape
from jaxengine.engine.device.batch_builder import packed_views
from jaxengine.engine.device.step import MIN_TOKENS_PER_ROW
from tests.helpers import greedy, make_llm, random_prompts, save_tiny_model

WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


class BothWays:
    """Runs each step a second time, all tokens through all layers, and keeps both outcomes."""

    def __init__(self, stage: Any, patch: pytest.MonkeyPatch) -> None:
        self._stage, self._run = stage, stage.run
        self.steps: list[tuple[StepShape, int, Any, Any]] = []  # shape, real rows, outcomes
        patch.setattr(stage, "run", self.run)

    def run(self, shape: StepShape, packed: np.ndarray, hidden: Any, **options: Any) -> Any:
        stage = self._stage
        before = jax.tree.map(jnp.copy, stage.state)
        every_token = self._run(shape, packed, hidden, returns_hidden=True)
        assert every_token.hidden.shape[0] == shape.num_tokens
        expected = self._on_host(every_token)
        stage.state = before
        outputs = self._run(shape, packed, hidden, **options)
        rows = int(np.count_nonzero(packed_views(shape, packed)["seq_lens"]))
        self.steps.append((shape, rows, expected, self._on_host(outputs)))
        return outputs

    def _on_host(self, outputs: Any) -> Any:
        """Token ids, logits, state; copied, as the next step takes the state's memory."""
        stage = self._stage
        return jax.tree.map(np.array, (outputs.token_ids, outputs.logits, stage.state))


@pytest.fixture(params=["llama", "sliding window"])
def any_llm(request: pytest.FixtureRequest, chat_model: Any, tmp_path: Any) -> LLM:
    if request.param == "llama":
        return make_llm(chat_model)
    save_tiny_model(tmp_path, "Qwen2", **WINDOW)
    return make_llm(tmp_path, skip_tokenizer_init=True)


def test_leaving_out_tokens_nobody_reads_changes_nothing(
    any_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = any_llm.engine.runner.stages
    both = BothWays(stage, monkeypatch)
    # Chunks that end inside a prompt, whole prompts, decode rows beside them.
    any_llm.generate(random_prompts(40, 3, 17, 30, 5), greedy(6), use_tqdm=False)
    left_out = [
        step for step in both.steps if step[0].num_tokens >= MIN_TOKENS_PER_ROW * step[0].num_rows
    ]
    assert len(left_out) > 3
    for _, rows, (ids, logits, state), (found_ids, found_logits, found_state) in both.steps:
        np.testing.assert_allclose(found_logits[:rows], logits[:rows], atol=1e-5)
        np.testing.assert_array_equal(found_ids[:rows], ids[:rows])
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found_state, state)
