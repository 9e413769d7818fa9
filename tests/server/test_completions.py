"""/v1/completions: what is asked for, against what the engine gives offline."""

from typing import Any

import pytest

from jaxengine import LLM
from tests.helpers import greedy
from tests.server.asgi import AsgiClient

TEXTS = ["the quick brown fox", "pages of keys and values"]
# The model's generation config has a repetition penalty, which offline tests leave out.
GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}


def complete(client: AsgiClient, prompt: Any = TEXTS[0], **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", {"prompt": prompt, **GREEDY, **fields})
    assert answer.status == 200, answer.body
    return dict(answer.json())


def stream(client: AsgiClient, prompt: Any = TEXTS[0], **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "stream": True, **GREEDY, **fields}
    return client.post("/v1/completions", body).chunks


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def test_an_answer_is_what_generate_gives(llm: LLM, client: AsgiClient) -> None:
    (output,) = llm.generate(TEXTS[0], greedy(12), use_tqdm=False)
    answer = complete(client, max_tokens=12, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["text"] == output.outputs[0].text
    assert choice["token_ids"] == output.outputs[0].token_ids
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    num_prompt = len(output.prompt_token_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == num_prompt + 12


def test_a_completion_has_sixteen_tokens_unless_asked_otherwise(client: AsgiClient) -> None:
    assert complete(client)["usage"]["completion_tokens"] == 16


def test_the_pieces_of_a_stream_join_to_the_whole(client: AsgiClient) -> None:
    chunks = stream(client, max_tokens=12)
    assert joined(chunks) == complete(client, max_tokens=12)["choices"][0]["text"]
    assert len(chunks) > 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [
        *([None] * (len(chunks) - 1)),
        "length",
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_ends_with_its_usage_if_asked(client: AsgiClient) -> None:
    *chunks, last = stream(client, max_tokens=5, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert all("usage" not in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c["usage"]["completion_tokens"] for c in stream(client, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 16


def test_prompts_of_a_batch_are_answered_in_their_order(llm: LLM, client: AsgiClient) -> None:
    expected = [o.outputs[0].text for o in llm.generate(TEXTS, greedy(6), use_tqdm=False)]
    answer = complete(client, TEXTS, max_tokens=6)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    chunks = stream(client, TEXTS, max_tokens=6)
    assert [joined(chunks, index) for index in range(2)] == expected


def test_token_ids_are_prompts_alone_and_in_batches(llm: LLM, client: AsgiClient) -> None:
    ids = [output.prompt_token_ids for output in llm.generate(TEXTS, greedy(1), use_tqdm=False)]
    texts = [c["text"] for c in complete(client, TEXTS, max_tokens=6)["choices"]]
    assert complete(client, ids[0], max_tokens=6)["choices"][0]["text"] == texts[0]
    batch = complete(client, ids, max_tokens=6, return_token_ids=True)["choices"]
    assert [choice["text"] for choice in batch] == texts
    assert [choice["prompt_token_ids"] for choice in batch] == ids


@pytest.mark.parametrize("streams", [False, True])
def test_echo_puts_the_prompt_in_front(client: AsgiClient, streams: bool) -> None:
    plain = complete(client, max_tokens=6)["choices"][0]["text"]
    if streams:
        text = joined(stream(client, max_tokens=6, echo=True))
    else:
        text = complete(client, max_tokens=6, echo=True)["choices"][0]["text"]
    assert text == TEXTS[0] + plain


def test_echo_with_no_tokens_scores_the_prompt(client: AsgiClient) -> None:
    answer = complete(client, max_tokens=0, echo=True, logprobs=1, return_token_ids=True)
    (choice,) = answer["choices"]
    scores = choice["logprobs"]["token_logprobs"]
    assert choice["text"] == TEXTS[0]
    assert choice["token_ids"] == []
    assert len(scores) == len(choice["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])
    assert answer["usage"]["completion_tokens"] == 0


def test_n_outputs_are_choices_and_a_seed_gives_them_again(client: AsgiClient) -> None:
    sampled = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    first, second = complete(client, **sampled), complete(client, **sampled)
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in second["choices"]]
    assert first["usage"]["completion_tokens"] == 24
    chunks = stream(client, **sampled)
    assert [joined(chunks, index) for index in range(3)] == texts


def test_n_of_a_batch_number_the_choices_prompt_after_prompt(client: AsgiClient) -> None:
    sampled = {"n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 4}
    choices = complete(client, TEXTS, **sampled)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    each_alone = [complete(client, text, **sampled)["choices"] for text in TEXTS]
    expected = [choice["text"] for alone in each_alone for choice in alone]
    assert [choice["text"] for choice in choices] == expected


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_of_the_output(llm: LLM, client: AsgiClient, streams: bool) -> None:
    (output,) = llm.generate(TEXTS[0], greedy(5, logprobs=2), use_tqdm=False)
    entries = output.outputs[0].logprobs
    assert entries is not None
    expected = [
        entry[token].logprob
        for entry, token in zip(entries, output.outputs[0].token_ids, strict=True)
    ]
    if streams:
        parts = [c["choices"][0]["logprobs"] for c in stream(client, max_tokens=5, logprobs=2)]
        found = {name: [x for part in parts for x in part[name]] for name in parts[0]}
    else:
        found = complete(client, max_tokens=5, logprobs=2)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert "".join(found["tokens"]) == output.outputs[0].text
    assert all(len(top) >= 2 for top in found["top_logprobs"])
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:index]) for index in range(5)]


def test_tokens_of_logprobs_may_be_ids(client: AsgiClient) -> None:
    fields = {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    (choice,) = complete(client, max_tokens=3, **fields)["choices"]
    names = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names


def test_stop_strings_end_an_output_and_are_cut_off(client: AsgiClient) -> None:
    text = complete(client, max_tokens=16)["choices"][0]["text"]
    stop = text[5:8]
    (choice,) = complete(client, max_tokens=16, stop=[stop])["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert joined(stream(client, max_tokens=16, stop=[stop])) == choice["text"]


def test_the_models_own_sampling_parameters_hold_where_none_are_given(client: AsgiClient) -> None:
    bare = {"prompt": TEXTS[0], "seed": 1, "max_tokens": 12, "ignore_eos": True}
    own = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2}
    answers = [
        client.post("/v1/completions", each).json()["choices"][0]["text"]
        for each in (bare, {**bare, **own}, {**bare, "temperature": 2.0, "top_k": 0, "top_p": 1.0})
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_choice_is_held_to(client: AsgiClient) -> None:
    fields = {"structured_outputs": {"choice": ["keys", "values"]}, "ignore_eos": False}
    assert complete(client, **fields)["choices"][0]["text"] in ("keys", "values")


def test_what_is_not_supported_is_refused_by_name(client: AsgiClient) -> None:
    for field in ({"suffix": "x"}, {"use_beam_search": True}, {"best_of": 3}):
        answer = client.post("/v1/completions", {"prompt": "a", **field})
        assert answer.status == 400
        assert answer.error["param"] == next(iter(field))
