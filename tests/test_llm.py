"""LLM on a tiny random model: every way to ask, compared with transformers where it can be."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine import LLM, RequestOutputKind, SamplingParams
from tests.helpers import (
    CHAT_TEMPLATE,
    assert_idle,
    greedy,
    hf_greedy,
    make_llm,
    output_ids,
    random_prompts,
    with_scheduler,
)

TEXTS = ["the quick brown fox", "once upon a time there was", "pages of keys and values"]
PROMPTS = random_prompts(5, 21, 40, 3)
CROWD = random_prompts(14, 15, 13, 12)  # with 20 tokens more each needs 3 blocks of 16


def generate_ids(llm: LLM, prompts: Any, params: Any) -> list[list[int]]:
    return output_ids(llm.generate(prompts, params, use_tqdm=False))


# What may be asked, and what comes back.


def test_greedy_tokens_are_those_of_transformers(llm: LLM, hf_model: Any) -> None:
    expected = [hf_greedy(hf_model, prompt, 12) for prompt in PROMPTS]
    assert generate_ids(llm, PROMPTS, greedy(12)) == expected


def test_text_token_ids_and_dicts_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer()(TEXTS[0])["input_ids"]
    forms = [
        TEXTS[0],
        ids,
        np.array(ids),
        {"prompt": TEXTS[0]},
        {"prompt_token_ids": ids},
        {"prompt": "only shown", "prompt_token_ids": ids},
    ]
    outputs = llm.generate(forms, greedy(5), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [ids] * len(forms)
    assert len({tuple(tokens) for tokens in output_ids(outputs)}) == 1
    assert [output.prompt for output in outputs] == [
        *(TEXTS[0], None, None, TEXTS[0]),
        *(None, "only shown"),
    ]


@pytest.mark.parametrize(
    "prompt", [None, 7, [None], [3.5], ["text", None], [["text"]], {"text": "x"}, [{"prompt": 5}]]
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        llm.generate(prompt, greedy(2), use_tqdm=False)
    with pytest.raises(ValueError, match="prompt"):
        next(llm.stream(prompt, greedy(2)))


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ({"prompt": "x", "promt_token_ids": [1]}, "no key 'promt_token_ids': use prompt, "),
        ({"prompt": "x", "salt": "a", "id": 1}, "no key 'salt', 'id'"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "'multi_modal_data' is not supported"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt must be a text that is not empty"),
        ({"prompt": "x", "cache_salt": 5}, "cache_salt must be"),
        ({"prompt_token_ids": [2**70]}, "token id 1180591620717411303424 is not in the vocab"),
        ({"prompt_token_ids": [-(2**70)]}, "is not in the vocabulary"),
    ],
    ids=str,
)
def test_an_error_names_the_key_of_a_prompt_that_means_nothing_here(
    llm: LLM, prompt: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        llm.generate([prompt], greedy(2), use_tqdm=False)


def test_keys_of_other_kinds_of_models_may_be_none(llm: LLM) -> None:
    prompt = {"prompt": "x", "multi_modal_data": None, "mm_processor_kwargs": {}}
    assert generate_ids(llm, [prompt], greedy(2)) == generate_ids(llm, ["x"], greedy(2))


def test_a_cache_salt_keeps_cached_blocks_from_those_of_another_salt(llm: LLM) -> None:
    llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": random_prompts(40, seed=9)[0]}

    def num_cached_tokens(**salt: str) -> int | None:
        (output,) = llm.generate([{**prompt, **salt}], greedy(2), use_tqdm=False)
        return output.num_cached_tokens

    assert num_cached_tokens(cache_salt="alice") == 0
    assert num_cached_tokens(cache_salt="bob") == 0
    assert num_cached_tokens() == 0
    assert num_cached_tokens(cache_salt="alice") == num_cached_tokens() == 32
    llm.reset_prefix_cache()


@pytest.mark.parametrize("as_array", [False, True])
def test_one_prompt_needs_no_list(llm: LLM, as_array: bool) -> None:
    expected = generate_ids(llm, [PROMPTS[0]], greedy(5))
    one = np.array(PROMPTS[0]) if as_array else PROMPTS[0]
    assert generate_ids(llm, one, greedy(5)) == expected


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], greedy(5), use_tqdm=False) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [greedy(n) for n in (9, 1, 6, 3)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert [len(tokens) for tokens in output_ids(outputs)] == [9, 1, 6, 3]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert all(output.finished for output in outputs)


def test_the_text_is_the_decoded_tokens(llm: LLM) -> None:
    (output,) = llm.generate(TEXTS[0], greedy(12), use_tqdm=False)
    completion = output.outputs[0]
    decoded = llm.get_tokenizer().decode(completion.token_ids, skip_special_tokens=True)
    assert completion.text == decoded != ""
    (silent,) = llm.generate(TEXTS[0], greedy(12, detokenize=False), use_tqdm=False)
    assert silent.outputs[0].text == ""
    assert silent.outputs[0].token_ids == completion.token_ids


def test_chat_uses_the_template_of_the_model(llm: LLM) -> None:
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "runs"}]
    conversations = [turns[:1], [*turns, turns[0]]]
    outputs = llm.chat(conversations, greedy(4), use_tqdm=False)
    assert [output.prompt for output in outputs] == [
        "<|user|>the fox</s><|assistant|>",
        "<|user|>the fox</s><|assistant|>runs</s><|user|>the fox</s><|assistant|>",
    ]
    alone = llm.chat(turns[:1], greedy(4), use_tqdm=False)
    assert output_ids(alone) == output_ids(outputs[:1])
    assert outputs[0].prompt_token_ids[0] == llm.get_tokenizer().get_vocab()["<|user|>"]


def test_chat_can_continue_the_last_message_with_another_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "runs aw"}]
    (output,) = llm.chat(
        messages,
        greedy(2),
        use_tqdm=False,
        chat_template=CHAT_TEMPLATE.replace("<|", "((").replace("|>", "))"),
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert output.prompt == "((user))a</s>((assistant))runs aw"


def test_stream_gives_what_generate_gives_bit_by_bit(llm: LLM) -> None:
    (whole,) = llm.generate(TEXTS[1], greedy(12), use_tqdm=False)
    growing = list(llm.stream(TEXTS[1], greedy(12)))
    assert [len(output.outputs[0].token_ids) for output in growing] == list(range(1, 13))
    assert growing[-1].outputs == whole.outputs
    assert [output.finished for output in growing] == [False] * 11 + [True]
    deltas = list(llm.stream(TEXTS[1], greedy(12, output_kind=RequestOutputKind.DELTA)))
    assert "".join(output.outputs[0].text for output in deltas) == whole.outputs[0].text
    tokens = [token for output in deltas for token in output.outputs[0].token_ids]
    assert tokens == whole.outputs[0].token_ids
    final = list(llm.stream(TEXTS[1], greedy(12, output_kind=RequestOutputKind.FINAL_ONLY)))
    assert [output.outputs for output in final] == [whole.outputs]


def test_a_stream_that_is_closed_early_leaves_nothing_behind(llm: LLM) -> None:
    for output in llm.stream(TEXTS[0], greedy(100)):
        if len(output.outputs[0].token_ids) == 3:
            break
    assert_idle(llm)


def test_generate_may_be_called_while_a_stream_is_open(llm: LLM) -> None:
    (expected,) = generate_ids(llm, TEXTS[0], greedy(8))
    stream = llm.stream(TEXTS[0], greedy(8))
    next(stream)
    assert len(generate_ids(llm, PROMPTS, greedy(20))) == len(PROMPTS)
    assert list(stream)[-1].outputs[0].token_ids == expected


def test_interleaved_streams_each_get_their_own_output(llm: LLM) -> None:
    expected = [llm.generate(text, greedy(8), use_tqdm=False)[0].outputs for text in TEXTS[:2]]
    streams = [llm.stream(text, greedy(8)) for text in TEXTS[:2]]
    pairs = list(itertools.zip_longest(*streams))
    assert len(pairs) == 8
    assert [output.outputs for output in pairs[-1]] == expected


# Sampling.


def test_a_seed_decides_the_tokens_whatever_shares_the_batch(llm: LLM) -> None:
    seeded = [SamplingParams(seed=s, max_tokens=20, ignore_eos=True) for s in (1, 2, 3, 4)]
    alone = [generate_ids(llm, [p], s)[0] for p, s in zip(CROWD, seeded, strict=True)]
    assert generate_ids(llm, CROWD, seeded) == alone
    small = with_scheduler(llm, num_blocks=6)
    assert generate_ids(small, CROWD, seeded) == alone
    assert small.stats().num_preemptions > 0
    other = generate_ids(llm, [CROWD[0]], SamplingParams(seed=9, max_tokens=20, ignore_eos=True))
    assert other[0] != alone[0]


def test_requests_without_a_seed_differ_but_a_new_engine_repeats_them(chat_model: Path) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    runs = []
    for _ in range(2):
        llm = make_llm(chat_model)
        runs.append(generate_ids(llm, [PROMPTS[0], PROMPTS[0]], params))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_n_outputs_differ_share_the_prompt_and_follow_the_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=10, ignore_eos=True)
    (output,) = llm.generate([PROMPTS[2]], params, use_tqdm=False)
    found = [completion.token_ids for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    alone = [params.clone(n=1, seed=5 + index) for index in range(3)]
    assert found == generate_ids(llm, [PROMPTS[2]] * 3, alone)
    assert len({tuple(tokens) for tokens in found}) == 3


def test_the_outputs_of_a_prompt_find_its_blocks_in_the_prefix_cache(llm: LLM) -> None:
    fresh = with_scheduler(llm)
    params = SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True)
    fresh.generate([PROMPTS[2]], params, use_tqdm=False)
    stats = fresh.stats()
    assert stats.prefix_cache_queries == 3 * 40
    assert stats.prefix_cache_hits > 0


@pytest.mark.parametrize("truncation", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_keeping_only_the_best_token_is_greedy(llm: LLM, truncation: dict[str, float]) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True, **truncation)
    assert generate_ids(llm, PROMPTS, params) == generate_ids(llm, PROMPTS, greedy(10))


def test_logit_bias_allowed_tokens_and_bad_words_rule_the_tokens(llm: LLM) -> None:
    assert generate_ids(llm, [PROMPTS[0]], greedy(4, logit_bias={77: 100})) == [[77] * 4]
    (allowed,) = generate_ids(llm, [PROMPTS[0]], greedy(8, allowed_token_ids=[50, 60]))
    assert set(allowed) <= {50, 60}
    (plain,) = llm.generate(TEXTS[0], greedy(8), use_tqdm=False)
    word = llm.get_tokenizer().decode(plain.outputs[0].token_ids[:1])
    (other,) = generate_ids(llm, TEXTS[0], greedy(8, bad_words=[word]))
    assert plain.outputs[0].token_ids[0] not in other


def penalised(model: Any, prompt: list[int], num_tokens: int, params: SamplingParams) -> list[int]:
    """Greedy tokens under penalties, one token at a time, as their definitions say."""
    from tests.helpers import hf_logits

    output: list[int] = []
    for _ in range(num_tokens):
        logits = hf_logits(model, prompt + output)[-1].astype(np.float64)
        for token in set(prompt + output):
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(output):
            count = output.count(token)
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        output.append(int(logits.argmax()))
    return output


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.7},
    ],
    ids=lambda penalties: " ".join(penalties),
)
def test_penalties_change_the_logits_as_defined(
    llm: LLM, hf_model: Any, penalties: dict[str, float]
) -> None:
    params = greedy(20, **penalties)
    expected = [penalised(hf_model, prompt, 20, params) for prompt in CROWD]
    assert generate_ids(llm, CROWD, params) == expected
    small = with_scheduler(llm, num_blocks=6)
    assert generate_ids(small, CROWD, params) == expected
    assert small.stats().num_preemptions > 0


# Where an output ends.


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate(TEXTS[1], greedy(20), use_tqdm=False)
    text, tokens = whole.outputs[0].text, whole.outputs[0].token_ids
    stop = text[7:10]
    (cut,) = llm.generate(TEXTS[1], greedy(20, stop=[stop, "never"]), use_tqdm=False)
    completion = cut.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == tokens[: len(completion.token_ids)]
    (kept,) = llm.generate(
        TEXTS[1], greedy(20, stop=stop, include_stop_str_in_output=True), use_tqdm=False
    )
    assert kept.outputs[0].text == text[: text.index(stop) + 3]


def test_a_stop_token_ends_the_output_and_is_its_last_token(llm: LLM) -> None:
    (tokens,) = generate_ids(llm, [PROMPTS[1]], greedy(20))
    stop_id = tokens[6]
    first = tokens.index(stop_id) + 1
    (output,) = llm.generate([PROMPTS[1]], greedy(20, stop_token_ids=[stop_id]), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == tokens[:first]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop_id)


def test_the_end_token_ends_the_output_unless_it_is_ignored(llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    params = greedy(6, ignore_eos=False, logit_bias={eos: 100})
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    completion = output.outputs[0]
    assert (completion.token_ids, completion.text) == ([eos], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert generate_ids(llm, [PROMPTS[0]], params.clone(ignore_eos=True)) == [[eos] * 6]


def test_min_tokens_keeps_stop_tokens_away(llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    params = greedy(9, ignore_eos=False, logit_bias={eos: 100}, min_tokens=4)
    (tokens,) = generate_ids(llm, [PROMPTS[0]], params)
    assert tokens.index(eos) == 4 == len(tokens) - 1


def test_without_max_tokens_the_model_decides_the_length(chat_model: Path) -> None:
    llm = make_llm(chat_model, max_model_len=48)
    (output,) = llm.generate([PROMPTS[1]], greedy(None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 48 - 21
    assert output.outputs[0].finish_reason == "length"


# Log probabilities.


def hf_logprobs(model: Any, token_ids: list[int]) -> np.ndarray:
    """Log probabilities [T, V] after each token."""
    from tests.helpers import hf_logits

    logits = hf_logits(model, token_ids).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_entry(entry: dict[int, Any], logprobs: np.ndarray, token: int, count: int) -> None:
    """One position: the token itself and the ``count`` most likely ones."""
    best = np.argsort(-logprobs, kind="stable")[:count].tolist()
    assert list(entry) == [token, *(i for i in best if i != token)]
    for token_id, found in entry.items():
        assert abs(found.logprob - logprobs[token_id]) < 1e-4
        assert found.rank == 1 + int((logprobs > logprobs[token_id]).sum())


def test_logprobs_of_sampled_tokens_are_those_of_transformers(llm: LLM, hf_model: Any) -> None:
    wanted = [3, 0, None, 7]
    params = [SamplingParams(seed=1, max_tokens=6, logprobs=k, ignore_eos=True) for k in wanted]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert outputs[2].outputs[0].logprobs is outputs[2].outputs[0].cumulative_logprob is None
    for output, count in zip(outputs, wanted, strict=True):
        completion = output.outputs[0]
        if count is None:
            continue
        expected = hf_logprobs(hf_model, output.prompt_token_ids + completion.token_ids)
        expected = expected[len(output.prompt_token_ids) - 1 :]
        total = 0.0
        for i, (token, entry) in enumerate(
            zip(completion.token_ids, completion.logprobs, strict=True)
        ):
            assert_entry(entry, expected[i], token, count)
            total += expected[i, token]
        assert abs(completion.cumulative_logprob - total) < 1e-3


def test_logprobs_ignore_temperature_bias_and_penalties(llm: LLM) -> None:
    plain = llm.generate([PROMPTS[0]], greedy(1, logprobs=5), use_tqdm=False)
    edited = greedy(1, logprobs=5, logit_bias={9: 20}, repetition_penalty=1.5)
    found = llm.generate([PROMPTS[0]], edited, use_tqdm=False)[0].outputs[0]
    assert found.token_ids == [9]
    for token_id, entry in plain[0].outputs[0].logprobs[0].items():
        assert abs(found.logprobs[0][token_id].logprob - entry.logprob) < 1e-5


@pytest.mark.parametrize("count", [pytest.param(0), 4])
@pytest.mark.parametrize("chunk_tokens", [7, 16])
def test_prompt_logprobs_are_those_of_transformers(
    llm: LLM, hf_model: Any, count: int, chunk_tokens: int
) -> None:
    chunked = with_scheduler(llm, max_num_batched_tokens=chunk_tokens)
    params = greedy(3, prompt_logprobs=count)
    chunked.generate(PROMPTS, greedy(3), use_tqdm=False)  # cached blocks must not hide a logprob
    for output in chunked.generate(PROMPTS, params, use_tqdm=False):
        prompt = output.prompt_token_ids
        expected = hf_logprobs(hf_model, prompt)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for i in range(1, len(prompt)):
            assert_entry(output.prompt_logprobs[i], expected[i - 1], prompt[i], count)


def test_prompt_logprobs_survive_preemption(llm: LLM, hf_model: Any) -> None:
    small = with_scheduler(llm, num_blocks=6)
    outputs = small.generate(CROWD, greedy(20, prompt_logprobs=0), use_tqdm=False)
    assert small.stats().num_preemptions > 0
    for output in outputs:
        prompt = output.prompt_token_ids
        expected = hf_logprobs(hf_model, prompt)
        for i in range(1, len(prompt)):
            assert_entry(output.prompt_logprobs[i], expected[i - 1], prompt[i], 0)


def test_the_whole_vocabulary_can_be_asked_for(chat_model: Path, hf_model: Any) -> None:
    llm = make_llm(chat_model, max_logprobs=-1)
    params = greedy(1, logprobs=-1, prompt_logprobs=-1)
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    tokens = output.prompt_token_ids + output.outputs[0].token_ids
    expected = hf_logprobs(hf_model, tokens)
    for i, entry in enumerate([*output.prompt_logprobs[1:], *output.outputs[0].logprobs]):
        assert_entry(entry, expected[i], tokens[i + 1], 160)


def test_named_tokens_can_be_scored(llm: LLM, hf_model: Any) -> None:
    params = greedy(1, logprob_token_ids=[11, 150])
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    expected = hf_logprobs(hf_model, PROMPTS[0])[-1]
    entry = output.outputs[0].logprobs[0]
    assert set(entry) == {11, 150, output.outputs[0].token_ids[0]}
    assert all(abs(found.logprob - expected[i]) < 1e-4 for i, found in entry.items())


# The model's defaults, and the life of an engine.


def test_default_sampling_params_are_the_models(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    found = (params.temperature, params.top_k, params.top_p, params.repetition_penalty)
    assert found == (0.7, 9, 0.8, 1.2)
    neutral = make_llm(llm.engine_config.model, generation_config="vllm")
    assert neutral.get_default_sampling_params() == SamplingParams()


def test_the_script_of_vllm_runs_with_only_the_import_renamed(
    chat_model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxengine import LLM, SamplingParams\n"
        f"prompts = {TEXTS!r}\n"
        f"llm = LLM(model={str(chat_model)!r}, tokenizer={str(chat_model)!r})\n"
        "params = SamplingParams(max_tokens=50, temperature=0.8)\n"
        "outputs = llm.generate(prompts, params)\n"
        "print(outputs[0].outputs[0].text)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, script], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert len(done.stdout.strip()) > 10
    assert "Processed prompts: 100%" in done.stderr


def test_an_interrupt_between_steps_leaves_a_usable_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(10))
    process, calls = llm._requests.processor.process, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return process(*args)

    monkeypatch.setattr(llm._requests.processor, "process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(10), use_tqdm=False)
    assert llm.engine.scheduler.block_pool.num_held_blocks == 0
    assert generate_ids(llm, PROMPTS, greedy(10)) == expected


def test_ctrl_c_inside_a_step_waits_for_its_end_and_leaves_a_usable_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(10))
    execute, steps = llm.engine.runner.execute, itertools.count()

    def press_ctrl_c(*step: Any) -> Any:
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return execute(*step)

    monkeypatch.setattr(llm.engine.runner, "execute", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(10), use_tqdm=False)
    assert llm.engine.scheduler.block_pool.num_held_blocks == 0
    assert generate_ids(llm, PROMPTS, greedy(10)) == expected


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What calls return or raise, each in a thread of its own."""
    results: list[Any] = ["still running"] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_threads_share_the_batch_and_each_gets_its_own_outputs(llm: LLM) -> None:
    lists = [random_prompts(5, 9, 14, seed=seed) for seed in range(4)]
    expected = [generate_ids(llm, prompts, greedy(12)) for prompts in lists]
    calls = [functools.partial(generate_ids, llm, prompts, greedy(12)) for prompts in lists]
    assert in_threads(*calls) == expected
    text = llm.generate("the fox", greedy(12), use_tqdm=False)[0].outputs[0].text
    chat = functools.partial(llm.chat, [{"role": "user", "content": "x"}], greedy(3))
    mixed = in_threads(
        lambda: [output.outputs[0].text for output in llm.stream("the fox", greedy(12))][-1],
        lambda: len(chat(use_tqdm=False)),
        lambda: type(generate_ids(llm, [[500]], greedy(2))),
        lambda: llm.get_metrics() is not None,
    )
    assert mixed[:2] == [text, 1]
    assert isinstance(mixed[2], ValueError)
    assert mixed[3]


def test_a_step_that_fails_ends_the_calls_of_all_threads_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(10))
    execute, num_threads = llm.engine.runner.execute, 3

    def fail(*step: Any) -> Any:
        if len(llm._requests.request_ids) == num_threads * len(PROMPTS):  # all have come
            monkeypatch.undo()
            raise MemoryError("the device is full")
        return execute(*step)

    monkeypatch.setattr(llm.engine.runner, "execute", fail)
    call = functools.partial(generate_ids, llm, PROMPTS, greedy(200))
    failures = in_threads(*[call] * num_threads)
    assert sorted(type(failure).__name__ for failure in failures) == [
        "MemoryError",
        "RuntimeError",
        "RuntimeError",
    ]
    assert all("the device is full" in str(failure) for failure in failures)
    assert generate_ids(llm, PROMPTS, greedy(10)) == expected


def test_a_stream_whose_engine_failed_under_another_call_ends_with_an_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream(PROMPTS[0], greedy(50))
    next(stream)

    def fail(*step: Any) -> Any:
        monkeypatch.undo()
        raise MemoryError("the device is full")

    monkeypatch.setattr(llm.engine.runner, "execute", fail)
    with pytest.raises(MemoryError):
        generate_ids(llm, PROMPTS, greedy(10))
    with pytest.raises(RuntimeError, match="the device is full"):
        list(stream)


def test_a_stream_whose_request_was_aborted_elsewhere_does_not_wait_for_ever(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], greedy(50))
    request_id = next(stream).request_id
    llm.abort_request(request_id)
    with pytest.raises(RuntimeError, match="aborted elsewhere"):
        list(stream)


def test_resetting_the_prefix_cache_forgets_it_unless_requests_run(llm: LLM) -> None:
    fresh = with_scheduler(llm)
    stream = fresh.stream([*PROMPTS[2]], greedy(30))
    next(stream)
    assert not fresh.reset_prefix_cache()
    stream.close()
    assert fresh.reset_prefix_cache()
    (output,) = fresh.generate([PROMPTS[2]], greedy(2), use_tqdm=False)
    assert output.num_cached_tokens == 0
    (output,) = fresh.generate([PROMPTS[2]], greedy(2), use_tqdm=False)
    assert output.num_cached_tokens == 32


def test_without_a_tokenizer_the_models_end_tokens_are_known(chat_model: Path) -> None:
    llm = make_llm(chat_model, skip_tokenizer_init=True)
    configured = json.loads((chat_model / "generation_config.json").read_text())["eos_token_id"]
    for end in [configured] if isinstance(configured, int) else configured:
        params = greedy(5, ignore_eos=False, allowed_token_ids=[end])
        (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        (completion,) = output.outputs
        assert (completion.token_ids, completion.finish_reason) == ([end], "stop")


def test_without_a_tokenizer_token_ids_go_in_and_out(chat_model: Path) -> None:
    llm = make_llm(chat_model, skip_tokenizer_init=True)
    (output,) = llm.generate([PROMPTS[0]], greedy(4), use_tqdm=False)
    assert (len(output.outputs[0].token_ids), output.outputs[0].text) == (4, "")
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate("text", greedy(4), use_tqdm=False)
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.get_tokenizer()


def test_metrics_of_a_request_are_in_their_order(llm: LLM) -> None:
    (output,) = llm.generate([PROMPTS[0]], greedy(5), use_tqdm=False)
    times = output.metrics
    assert times.arrival_time <= times.first_token_time <= times.last_token_time
    assert times.last_token_time <= times.finished_time
    assert times.num_generation_tokens == 5


def test_priorities_decide_who_goes_first(llm: LLM) -> None:
    ordered = with_scheduler(llm, policy="priority")
    finished: list[int] = []
    process = ordered._requests.processor.process

    def record(*args: Any) -> Any:
        result = process(*args)
        finished.extend(len(output.prompt_token_ids) for output in result.request_outputs)
        return result

    prompts = random_prompts(10, 11, 12, 13, 14, 15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered._requests.processor, "process", record)
        ordered.generate(prompts, greedy(8), use_tqdm=False, priority=[5, 4, 3, 2, 1, 0])
    assert sorted(finished[-2:]) == [10, 11]
