"""Weights that change while the model is served: transformers with the same weights agrees."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from jaxengine import LLM
from tests.helpers import greedy, hf_greedy, make_llm, output_ids, random_prompts, save_tiny_model

PROMPTS = random_prompts(21, 5)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": False},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": 256},
    "Mixtral": {"num_local_experts": 4},
}


def load(directory: Path, family: str) -> tuple[LLM, Any]:
    hf = save_tiny_model(directory, family, **FAMILIES[family])
    return make_llm(directory, skip_tokenizer_init=True, max_model_len=256), hf


def tokens_of(llm: LLM) -> list[list[int]]:
    return output_ids(llm.generate(PROMPTS, greedy(6), use_tqdm=False))


def num_programs(llm: LLM) -> int:
    return sum(len(stage._programs) for stage in llm.engine.runner.stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_change_in_place(tmp_path: Path, family: str) -> None:
    llm, _ = load(tmp_path / "old", family)
    old = tokens_of(llm)
    compiled = num_programs(llm)
    new = save_tiny_model(tmp_path / "new", family, seed=1, **FAMILIES[family])
    expected = [hf_greedy(new, prompt, 6) for prompt in PROMPTS]
    assert old != expected
    llm.update_weights(tmp_path / "new")
    assert tokens_of(llm) == expected
    assert llm.stats().prefix_cache_hits == 0
    llm.update_weights(tmp_path / "old")
    assert tokens_of(llm) == old
    stored = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    llm.update_weights((name, tensor) for name, tensor in stored.items())
    assert tokens_of(llm) == expected
    assert num_programs(llm) == compiled


def test_a_part_of_a_fused_weight_changes(tmp_path: Path) -> None:
    llm, hf = load(tmp_path, "Llama")
    before = dict(llm.functional().weights)
    name = "model.layers.1.self_attn.k_proj.weight"
    with torch.no_grad():
        hf.get_parameter(name).mul_(-2.0)
    changed = llm.update_weights({name: hf.get_parameter(name)})
    assert changed == ["layers.1.attention.qkv_proj.weight"]
    assert tokens_of(llm) == [hf_greedy(hf, prompt, 6) for prompt in PROMPTS]
    after = llm.functional().weights
    assert [path for path in before if after[path] is not before[path]] == changed
    with torch.no_grad():  # the engine has a copy
        hf.get_parameter(name).mul_(0.0)
    key = np.asarray(after[changed[0]])
    assert np.all(np.any(key != 0, axis=0))


def test_an_optimisers_tree_is_taken(tmp_path: Path) -> None:
    llm, _ = load(tmp_path, "Llama")
    model = llm.functional()
    tokens = jnp.array(PROMPTS[0])

    @jax.jit
    def loss(weights: Any) -> Any:
        logits = jax.nn.log_softmax(model.apply(weights, tokens)[:-1])
        return -jnp.mean(jnp.take_along_axis(logits, tokens[1:, None], axis=1))

    first = loss(model.weights)
    slopes = jax.jit(jax.grad(loss))(model.weights)
    step = {path: array - 0.05 * slopes[path] for path, array in model.weights.items()}
    llm.update_weights(step)
    assert loss(model.weights) < first
    np.testing.assert_allclose(loss(model.weights), loss(step), rtol=1e-6)
    logits = model.apply(step, tokens)
    assert tokens_of(llm)[0][0] == int(jnp.argmax(logits[-1]))


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    llm, _ = load(tmp_path / "own", "Llama")
    before = tokens_of(llm)
    good = ("model.norm.weight", np.zeros(32, np.float32))
    with pytest.raises(ValueError, match=r"did you mean 'model\.norm\.weight'"):
        llm.update_weights([good, ("model.norm.weigth", good[1])])
    with pytest.raises(ValueError, match=r"\(33,\), expected \(32,\)"):
        llm.update_weights([("model.layers.0.input_layernorm.weight", np.zeros(33)), good])
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(32,\)"):
        llm.update_weights({"norm.weight": np.zeros(1)})
    with pytest.raises(ValueError, match="twice"):
        llm.update_weights([good, good])
    with pytest.raises(ValueError, match="no weights"):
        llm.update_weights({})
    save_tiny_model(tmp_path / "other", "GPT2", **FAMILIES["GPT2"])
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        llm.update_weights(tmp_path / "other")
    save_tiny_model(tmp_path / "wider", "Llama", hidden_size=64, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="expected"):
        llm.update_weights(tmp_path / "wider")
    llm.reset_prefix_cache()
    assert tokens_of(llm) == before
    request = llm.add_request({"prompt_token_ids": PROMPTS[0]}, greedy(6))
    with pytest.raises(ValueError, match="1 requests run"):
        llm.update_weights([good])
    llm.abort_request(request)
    llm.update_weights([good])
    assert tokens_of(llm) != before
