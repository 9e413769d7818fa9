"""What vLLM's LLM has besides generate and chat."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxengine
from jaxengine import LLM, BeamSearchParams, SamplingParams
from jaxengine.metrics import Counter, Gauge
from tests.helpers import greedy, hf_logits, make_llm, output_ids, random_prompts

PROMPTS = random_prompts(5, 21, 9)


def generate_ids(llm: LLM, prompts: Any, params: Any, **options: Any) -> list[list[int]]:
    return output_ids(llm.generate(prompts, params, use_tqdm=False, **options))


def hf_logprobs(model: Any, tokens: list[int]) -> np.ndarray:
    logits = hf_logits(model, tokens)[-1].astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def hf_beam_search(model: Any, prompt: list[int], params: BeamSearchParams, eos: Any) -> list[Any]:
    """The slow, obvious version: every beam's whole sequence in every round."""
    beams, completed = [(0.0, prompt)], []

    def score(beam: tuple[float, list[int]]) -> float:
        return beam[0] / (len(beam[1]) - len(prompt)) ** params.length_penalty

    for _ in range(params.max_tokens):
        grown = []
        for total, tokens in beams:
            logprobs = hf_logprobs(model, tokens)
            allowed = params.allowed_token_ids
            best = np.argsort(-logprobs)[: 2 * params.beam_width] if allowed is None else allowed
            for token in best:
                beam = (total + logprobs[token], [*tokens, int(token)])
                (completed if token in eos and not params.ignore_eos else grown).append(beam)
        beams = sorted(grown, key=score, reverse=True)[: params.beam_width]
    return sorted(completed + beams, key=score, reverse=True)[: params.beam_width]


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True},
        {"length_penalty": 0.0},
        {"allowed_token_ids": [2, 10, 11, 12], "length_penalty": 2.0},
    ],
    ids=str,
)
def test_beam_search_finds_what_the_obvious_search_finds(
    llm: LLM, hf_model: Any, options: dict[str, Any]
) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=4, **options)
    outputs = llm.beam_search([{"prompt_token_ids": ids} for ids in PROMPTS[:2]], params)
    for prompt, output in zip(PROMPTS[:2], outputs, strict=True):
        expected = hf_beam_search(hf_model, prompt, params, llm.engine.eos_token_ids)
        assert [beam.tokens for beam in output.sequences] == [tokens for _, tokens in expected]
        found = [beam.cum_logprob for beam in output.sequences]
        np.testing.assert_allclose(found, [total for total, _ in expected], atol=1e-3)
        ends = llm.engine.eos_token_ids
        reasons = ["stop" if tokens[-1] in ends else "length" for _, tokens in expected]
        if not params.ignore_eos:
            assert [beam.finish_reason for beam in output.sequences] == reasons
        best = output.sequences[0]
        assert best.text == llm.get_tokenizer().decode(best.tokens, skip_special_tokens=True)


def test_beams_end_at_the_models_length_and_bad_values_are_refused(llm: LLM) -> None:
    longest = llm.model_config.max_model_len
    prompt = random_prompts(longest - 2)[0]
    params = BeamSearchParams(beam_width=2, max_tokens=9, ignore_eos=True)
    (output,) = llm.beam_search([prompt], params, concurrency_limit=1)
    assert [len(beam.tokens) for beam in output.sequences] == [longest] * 2
    for wrong in ({"beam_width": 0}, {"max_tokens": 0}, {"allowed_token_ids": []}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BeamSearchParams(**{"beam_width": 1, "max_tokens": 1, **wrong})
    with pytest.raises(ValueError, match="allowed_token_ids holds 9999"):
        llm.beam_search(
            [prompt], BeamSearchParams(beam_width=1, max_tokens=1, allowed_token_ids=[9999])
        )


def test_what_was_enqueued_comes_back_in_its_order(llm: LLM) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(6))
    first = llm.enqueue(PROMPTS[:1], greedy(6))
    rest = llm.enqueue(PROMPTS[1:], [greedy(6)] * 2, priority=3)
    assert generate_ids(llm, PROMPTS, greedy(6)) == expected, "others may generate meanwhile"
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == first + rest
    assert output_ids(outputs) == expected
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_the_engine_can_be_driven_step_by_step(llm: LLM) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(6))
    engine = llm.llm_engine
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(f"r{number}", {"prompt_token_ids": prompt}, greedy(6))
    engine.add_request("gone", "text", greedy(60))
    with pytest.raises(ValueError, match="'r1' is in use"):
        engine.add_request("r1", "text", greedy(6))
    engine.abort_request(["gone"])
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0].token_ids
    assert [finished[f"r{number}"] for number in range(3)] == expected
    assert engine.get_num_unfinished_requests() == 0


def test_the_model_is_described_under_vllms_names(llm: LLM, chat_model: Path) -> None:
    for config in (llm.model_config, llm.llm_engine.model_config):
        assert (config.max_model_len, config.get_vocab_size(), config.dtype) == (
            *(256, llm.engine.model_config.vocab_size, "float32"),
        )
        assert config.hf_config.num_hidden_layers == config.num_layers
        assert (config.model, config.runner_type) == (str(chat_model), "generate")
    assert llm.get_world_size() == 1


def test_metrics_are_a_list_of_vllms_names(llm: LLM) -> None:
    def values() -> dict[str, float]:
        return {metric.name: metric.value for metric in llm.get_metrics()}

    before = values()
    generate_ids(llm, [PROMPTS[0]], greedy(6))
    after = values()
    assert after["vllm:prompt_tokens"] - before["vllm:prompt_tokens"] == 5
    assert after["vllm:generation_tokens"] - before["vllm:generation_tokens"] == 6
    assert after["vllm:num_requests_running"] == 0
    kinds = {metric.name: type(metric) for metric in llm.get_metrics()}
    assert (kinds["vllm:prompt_tokens"], kinds["vllm:kv_cache_usage_perc"]) == (Counter, Gauge)


def test_prompts_are_cut_and_encoded_as_tokenization_kwargs_say(llm: LLM) -> None:
    generate = functools.partial(llm.generate, use_tqdm=False)
    ids = random_prompts(40)[0]

    def prompt_of(prompt: Any, **options: Any) -> list[int]:
        (output,) = generate([prompt], greedy(1), tokenization_kwargs=options)
        return output.prompt_token_ids

    assert prompt_of({"prompt_token_ids": ids}, truncate_prompt_tokens=5) == ids[-5:]
    options = {"truncate_prompt_tokens": 5, "truncation_side": "right"}
    assert prompt_of({"prompt_token_ids": ids}, **options) == ids[:5]
    too_long = random_prompts(300)[0]
    assert prompt_of({"prompt_token_ids": too_long}, truncate_prompt_tokens=-1) == too_long[-255:]
    tokenizer = llm.get_tokenizer()
    plain = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    assert prompt_of("the fox", add_special_tokens=False) == plain
    for wrong in ({"padding": True}, {"truncate_prompt_tokens": 0}, {"truncation_side": "top"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            prompt_of("x", **wrong)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_request": object()}, "lora_request is not supported: merge the adapter"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs is not supported"),
        ({"priority": [1]}, "1 priorities were given for 3 prompts"),
        ({"priority": 2**63}, "priority must be an integer of 64 bits"),
        ({"prompt_token_ids": PROMPTS}, "prompts, as text or as token ids"),
    ],
)
def test_an_argument_that_asks_for_what_is_not_there_is_refused(
    llm: LLM, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        llm.generate(PROMPTS, greedy(2), use_tqdm=False, **options)


def test_arguments_that_ask_for_nothing_are_taken(llm: LLM) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(3))
    options = {"lora_request": None, "priority": 5, "mm_processor_kwargs": None}
    assert generate_ids(llm, PROMPTS, greedy(3), **options) == expected
    assert generate_ids(llm, None, greedy(3), prompt_token_ids=PROMPTS) == expected
    bars: list[dict[str, Any]] = []

    def make_bar(**bar_options: Any) -> Any:
        bars.append(bar_options)
        import tqdm

        return tqdm.tqdm(disable=True, **bar_options)

    llm.generate(PROMPTS, greedy(3), use_tqdm=make_bar)
    assert bars[0]["total"] == 3


def test_flat_logprobs_read_like_the_others(llm: LLM) -> None:
    params = greedy(4, logprobs=2, prompt_logprobs=1)
    (plain,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    (flat,) = llm.generate([PROMPTS[0]], params.clone(flat_logprobs=True), use_tqdm=False)
    logprobs = flat.outputs[0].logprobs
    assert isinstance(logprobs, jaxengine.FlatLogprobs)
    assert logprobs == plain.outputs[0].logprobs
    assert (logprobs[1:3], logprobs[-1]) == (list(logprobs)[1:3], list(logprobs)[-1])
    assert flat.prompt_logprobs == plain.prompt_logprobs
    assert flat.prompt_logprobs[0] is None
    assert len(logprobs.token_ids) == logprobs.end_indices[-1]


def test_a_request_may_leave_the_prefix_cache_alone(llm: LLM) -> None:
    prompt = random_prompts(40, seed=77)
    for params, expected in ((greedy(1), 0), (greedy(1), 32)):
        assert llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens == expected
    alone = greedy(1, skip_reading_prefix_cache=True)
    assert llm.generate(prompt, alone, use_tqdm=False)[0].num_cached_tokens == 0


def test_logprobs_are_taken_where_the_mode_says(chat_model: Path, hf_model: Any) -> None:
    params = SamplingParams(
        temperature=0.5, top_k=3, seed=1, max_tokens=1, logprobs=5, logit_bias={20: 4.0}
    )
    logits = hf_logits(hf_model, PROMPTS[0])[-1].astype(np.float64)
    edited = logits.copy()
    edited[20] += 4.0
    edited /= 0.5
    edited[edited < np.sort(edited)[-3]] = -np.inf
    sources = {"raw": logits, "processed": edited}
    for mode in ("raw_logits", "processed_logits", "processed_logprobs"):
        llm = make_llm(chat_model, logprobs_mode=mode)
        (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        expected = sources[mode.split("_")[0]]
        if mode.endswith("logprobs"):
            expected = expected - math.log(np.exp(expected).sum())
        entries = output.outputs[0].logprobs[0].items()
        found = {token: entry.logprob for token, entry in entries}
        assert len(found) >= 5
        np.testing.assert_allclose(
            list(found.values()), [expected[token] for token in found], atol=2e-3
        )


def test_a_sleeping_engine_gives_its_memory_back_and_wakes_up_the_same(chat_model: Path) -> None:
    llm = make_llm(chat_model)
    expected = generate_ids(llm, PROMPTS, greedy(5))
    (stage,) = llm.engine.runner.stages
    for level in (0, 1, 2):
        llm.sleep(level)
        if level:
            assert stage.params == {}
            with pytest.raises(ValueError, match="the engine sleeps: call wake_up first"):
                generate_ids(llm, PROMPTS, greedy(5))
        assert llm.wake_up()
        assert generate_ids(llm, PROMPTS, greedy(5)) == expected
    with pytest.raises(ValueError, match="levels 0, 1 and 2"):
        llm.sleep(3)


def test_functions_reach_the_runner_and_the_module(llm: LLM) -> None:
    assert llm.collective_rpc(lambda runner, n: n + len(runner.stages), args=(2,)) == [3]
    with pytest.raises(ValueError, match="no method 'load_weights'"):
        llm.collective_rpc("load_weights")
    (counts,) = llm.apply_model(lambda module: type(module).__name__)
    assert isinstance(counts, str)


def test_a_profile_is_a_trace_in_its_directory(llm: LLM, tmp_path: Path) -> None:
    import copy
    import dataclasses

    traced = copy.copy(llm)
    traced.engine_config = dataclasses.replace(llm.engine_config, profiler_dir=str(tmp_path))
    traced.start_profile("first")
    generate_ids(traced, [PROMPTS[0]], greedy(2))
    traced.stop_profile()
    assert list((tmp_path / "first").rglob("*.xplane.pb"))


def test_the_generation_config_can_be_overridden_and_lie_elsewhere(
    chat_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7}')
    llm = make_llm(
        chat_model,
        generation_config=str(tmp_path),
        override_generation_config={"top_k": 9, "max_new_tokens": 3},
        max_num_seqs=None,
    )
    assert llm.get_default_sampling_params() == SamplingParams(
        temperature=0.25, top_k=9, max_tokens=3
    )
    assert llm.engine.scheduler.max_num_seqs == 16, "max_num_batched_tokens clamps it"
    with pytest.raises(ValueError, match="neither 'auto' nor 'vllm' nor a directory"):
        make_llm(chat_model, generation_config=str(tmp_path / "missing"))


def test_a_chat_template_can_be_given_to_the_model(chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    llm = make_llm(chat_model, chat_template=file)
    message = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(message, greedy(1), use_tqdm=False)
    assert output.prompt == "[hi]"
    (output,) = llm.chat(message, greedy(1), False, chat_template="{{ messages | length }}")
    assert output.prompt == "1"
