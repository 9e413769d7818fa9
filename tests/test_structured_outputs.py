"""Structured outputs through the whole engine, on a tiny random model that writes nonsense else."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.outputs import RequestOutput
from jaxengine.structured.params import StructuredOutputsParams
from tests.helpers import (
    make_llm,
    output_ids,
    random_prompts,
    run_on_virtual_devices,
    with_scheduler,
)

EOS = 2


def obj(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with all of these properties and no others."""
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed, **more}


SHORT = {"type": "string", "maxLength": 4}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
# Every feature that docs/json_schema.md of llguidance lists, each small enough to end.
FEATURES: dict[str, Any] = {
    "anyOf": {"anyOf": [DIGIT, {"type": "boolean"}]},
    "oneOf": {"oneOf": [{"type": "null"}, {"type": "boolean"}]},
    "allOf": {"allOf": [obj({"a": DIGIT, "b": SHORT}), {"properties": {"a": {"minimum": 5}}}]},
    "$ref": {"$defs": {"d": DIGIT}, **obj({"a": {"$ref": "#/$defs/d"}})},
    "$ref to itself": {"$defs": {"list": {"anyOf": [{"type": "null"}, obj(
        {"next": {"$ref": "#/$defs/list"}})]}}, "$ref": "#/$defs/list"},
    "const": obj({"a": {"const": {"x": [1, None, "two"]}}}),
    "enum": {"enum": ["red", 5, None, [1], {"a": 2}]},
    "type null": {"type": "null"},
    "type boolean": {"type": "boolean"},
    "types": {"type": ["boolean", "null"]},
    "siblings": {"anyOf": [obj({"a": DIGIT, "b": DIGIT})], "properties": {"a": {"minimum": 7}}},
    "items": {"type": "array", "items": DIGIT, "maxItems": 4},
    "prefixItems": {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 2},
    "minItems": {"type": "array", "items": DIGIT, "minItems": 3, "maxItems": 5},
    "maxItems": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    "properties": {"type": "object", "properties": {"a": DIGIT, "b": SHORT},
                   "additionalProperties": False},
    "additionalProperties": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 2},
    "patternProperties": {"type": "object", "patternProperties": {"^k[0-9]$": DIGIT},
                          "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
    "required": {"type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "required": ["b"],
                 "additionalProperties": False},
    "minProperties": {"type": "object", "patternProperties": {"^[a-c]$": DIGIT},
                      "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
    "minLength": {"type": "string", "minLength": 3, "maxLength": 6},
    "maxLength": {"type": "string", "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[A-F]{2}-[0-9]+x$", "maxLength": 9},
    "date-time": {"type": "string", "format": "date-time"},
    "time": {"type": "string", "format": "time"},
    "date": {"type": "string", "format": "date"},
    "duration": {"type": "string", "format": "duration"},
    "email": {"type": "string", "format": "email"},
    "hostname": {"type": "string", "format": "hostname"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "uri": {"type": "string", "format": "uri"},
    "minimum": {"type": "integer", "minimum": -12, "maximum": 40},
    "maximum": {"type": "number", "minimum": 0, "maximum": 1.5},
    "exclusiveMinimum": {"type": "integer", "exclusiveMinimum": 7, "maximum": 9},
    "exclusiveMaximum": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "multipleOf": {"type": "integer", "multipleOf": 25, "minimum": 0, "maximum": 5000},
    "coerced oneOf": {"oneOf": [obj({"kind": {"const": "a"}}), obj({"kind": {"const": "b"}})]},
}  # fmt: skip


def structured(seed: int, max_tokens: int = 220, **fields: Any) -> SamplingParams:
    """Random sampling of JSON without whitespace, or of another form."""
    params = StructuredOutputsParams(**{"disable_any_whitespace": "json" in fields, **fields})
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=max_tokens, structured_outputs=params
    )


def closing_bias(llm: LLM) -> dict[int, float]:
    """Makes what ends a string or a number likelier, so that a random output comes to its end."""
    vocab = llm.get_tokenizer().get_vocab()
    return {vocab[text]: 3.0 for text in ('"', "}", "]", "</s>")}


def with_a_real_date(text: str) -> str:
    """The library knows neither leap years nor that Python's begin with 1."""
    return re.sub(r"^\"0000-", '"0001-', text).replace("-02-29", "-02-28")


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [completion.text for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_of_a_schema_gives_valid_output_under_random_sampling(
    llm: LLM, name: str
) -> None:
    schema = FEATURES[name]
    params = [structured(seed, json=schema) for seed in range(4)]
    params = [each.clone(logit_bias=closing_bias(llm)) for each in params]
    outputs = llm.generate(random_prompts(3, 4, 5, 6), params, use_tqdm=False)
    checker = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    finished = [o.outputs[0] for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert len(finished) >= (1 if name == "uri" else 3), texts(outputs)
    for completion in finished:
        checker.validate(json.loads(with_a_real_date(completion.text)))
        assert completion.token_ids[-1] == EOS


def test_whitespace_is_free_unless_it_is_turned_off(llm: LLM) -> None:
    schema = {"type": "array", "prefixItems": [DIGIT] * 6, "items": False, "minItems": 6}
    free = structured(0, json=schema, disable_any_whitespace=False).clone(top_k=1)
    vocab = llm.get_tokenizer().get_vocab()
    free = free.clone(logit_bias={vocab["Ġ"]: 8.0}, max_tokens=30)
    (text,) = texts(llm.generate("x", free, use_tqdm=False))
    assert re.match(r"\[ +", text)
    bounded = structured(0, json=schema, disable_any_whitespace=False, whitespace_pattern=" ?")
    (text,) = texts(llm.generate("x", bounded.clone(logit_bias={vocab["Ġ"]: 50.0}), use_tqdm=False))
    assert re.fullmatch(r"\[ (\d , ){5}\d \]", text), text


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"[a-c]{2,5}-\d{3}"}, r"[a-c]{2,5}-\d{3}"),
        ({"choice": ["alpha", "alphabet", "beta gamma"]}, "alpha|alphabet|beta gamma"),
        ({"grammar": 'start: "(" start ")" | "x" start | /[0-9]/'}, r"[(x]*\d\)*"),
        ({"grammar": 'root ::= "x" root | [0-9]'}, r"x*\d"),
        ({"structural_tag": {"format": {"type": "tag", "begin": "<f>", "end": "</f>",
          "content": {"type": "json_schema", "json_schema": {"enum": [1, "two"]}}}}},
         r'<f>(1|"two")</f>'),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_every_kind_of_grammar_is_obeyed(llm: LLM, fields: Any, pattern: str) -> None:
    params = [structured(seed, **fields) for seed in range(4)]
    params.append(params[0].clone(temperature=0.0, seed=None))
    outputs = llm.generate(random_prompts(3, 4, 5, 6, 7), params, use_tqdm=False)
    found = texts(outputs)
    assert [text for text in found if not re.fullmatch(pattern, text)] == []
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}


def mixed_params(rng: random.Random) -> SamplingParams:
    """Greedy or random, free or in some form. (Each kind of batch is one more program.)"""
    form = rng.choice(
        [None, None, {"regex": "([a-z]{3} )+"}, {"json_object": True}, {"choice": ["abc"]}]
    )
    return SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(100),
        max_tokens=rng.randint(8, 40),
        logprobs=1,
        structured_outputs=form,
    )


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_in_a_mixed_batch_every_request_gets_what_it_gets_alone(
    llm: LLM, max_in_flight: int
) -> None:
    """With preemption, chunked prompts and cached prefixes; rows without a grammar, too."""
    rng = random.Random(0)
    params = [mixed_params(rng) for _ in range(24)]
    (shared,) = random_prompts(20)
    prompts = [shared + p for p in random_prompts(*(rng.randint(1, 30) for _ in params))]
    alone = with_scheduler(llm, max_num_seqs=1, max_in_flight=1)
    expected = [
        alone.generate(prompt, each, use_tqdm=False)[0]
        for prompt, each in zip(prompts, params, strict=True)
    ]
    small = with_scheduler(llm, num_blocks=8, max_in_flight=max_in_flight)
    found = small.generate(prompts, params, use_tqdm=False)
    assert small.stats().num_preemptions > 0
    assert small.stats().prefix_cache_hits > 0
    assert output_ids(found) == output_ids(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].finish_reason == other.outputs[0].finish_reason
        scores = [output.outputs[0].cumulative_logprob for output in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_rows_without_a_grammar_keep_every_bit_beside_one_that_has_one(llm: LLM) -> None:
    free = SamplingParams(temperature=1.0, seed=4, max_tokens=20, logprobs=1, ignore_eos=True)
    prompts = random_prompts(5, 6, 7)
    beside = llm.generate(prompts, [free, free, free.clone(seed=9)], use_tqdm=False)
    params = [free, free, structured(9, max_tokens=20, regex="[a-z]{30}").clone(logprobs=1)]
    mixed = llm.generate(prompts, params, use_tqdm=False)
    assert output_ids(mixed[:2]) == output_ids(beside[:2])
    scores = [[o.outputs[0].cumulative_logprob for o in run[:2]] for run in (mixed, beside)]
    assert scores[0] == scores[1]


def test_a_structured_output_is_what_slow_masking_of_the_logits_gives(
    llm: LLM, hf_model: Any
) -> None:
    """Greedy, against transformers: the likeliest token among those that keep the text valid."""
    from tests.helpers import hf_logits

    pattern, vocab = re.compile(r"[ab]{1,4}"), llm.get_tokenizer().get_vocab()
    token_of = {v: k for k, v in vocab.items()}
    prompt, text, tokens = random_prompts(9)[0], "", []
    while not tokens or tokens[-1] != EOS:
        logits = hf_logits(hf_model, prompt + tokens)[-1]
        allowed = [t for t, s in token_of.items() if re.fullmatch(r"[ab]+", s)
                   and len(text + s) <= 4]  # fmt: skip
        allowed += [EOS] if pattern.fullmatch(text) else []
        tokens.append(max(allowed, key=lambda t: logits[t]))
        text += token_of[tokens[-1]] if tokens[-1] != EOS else ""
    params = SamplingParams(temperature=0, max_tokens=9, structured_outputs={"regex": "[ab]{1,4}"})
    assert output_ids(llm.generate(prompt, params, use_tqdm=False)) == [tokens]


def test_several_outputs_of_one_prompt_each_follow_the_grammar(llm: LLM) -> None:
    params = structured(5, regex="[a-f]{6}").clone(n=3)
    (output,) = llm.generate("x", params, use_tqdm=False)
    found = [completion.text for completion in output.outputs]
    assert all(re.fullmatch("[a-f]{6}", text) for text in found)
    assert len(set(found)) == 3
    alone = [
        llm.generate("x", params.clone(n=1, seed=5 + index), use_tqdm=False)[0].outputs[0].text
        for index in range(3)
    ]
    assert found == alone


@pytest.mark.parametrize(
    "bans",
    [
        {"min_tokens": 9},
        {"bad_words": ["a"]},
        {"allowed_token_ids": [7]},
        {"logit_bias": {2: -100}},
    ],
    ids=str,
)
def test_where_another_parameter_leaves_nothing_the_grammar_counts(llm: LLM, bans: Any) -> None:
    params = structured(0, choice=["a"]).clone(max_tokens=9, **bans)
    (output,) = llm.generate("x", params, use_tqdm=False)
    assert output.outputs[0].text.startswith("a")
    assert set(output.outputs[0].token_ids[1:]) == {EOS}


def test_without_end_tokens_to_stop_at_an_ended_grammar_allows_only_them(llm: LLM) -> None:
    params = structured(0, choice=["a"]).clone(max_tokens=5, ignore_eos=True)
    (output,) = llm.generate("x", params, use_tqdm=False)
    assert list(output.outputs[0].token_ids)[1:] == [EOS] * 4
    assert output.outputs[0].finish_reason == "length"


def test_a_grammar_that_cannot_go_on_aborts_its_request_with_the_reason(llm: LLM) -> None:
    params = structured(0, choice=["né"])  # the tiny vocabulary has no bytes beyond ASCII
    broken, fine = llm.generate(["x", "x"], [params, structured(0, choice=["no"])], use_tqdm=False)
    assert broken.outputs[0].finish_reason == "abort"
    assert isinstance(broken.outputs[0].stop_reason, str)
    assert fine.outputs[0].text == "no"
    assert fine.outputs[0].finish_reason == "stop"


def test_a_bad_grammar_is_refused_before_any_prompt_runs(llm: LLM) -> None:
    params = [structured(0, choice=["a"]), structured(0, regex="(?=a)")]
    with pytest.raises(ValueError, match="the regex of structured_outputs cannot be compiled"):
        llm.generate(["x", "x"], params, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests


def test_a_step_is_dispatched_before_the_tokens_of_the_last_are_read_for_masks_too(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward k+1, read token k, masks, sampling k+1: the devices never wait for the host."""
    engine = with_scheduler(llm, max_in_flight=2).engine
    events: list[str] = []
    (stage,) = engine.runner.stages
    run, sample = stage.run, engine.runner._samplers.sample
    monkeypatch.setattr(stage, "run", lambda *a, **k: events.append("forward") or run(*a, **k))
    monkeypatch.setattr(
        engine.runner._samplers,
        "sample",
        lambda *a, **k: events.append("sample") or sample(*a, **k),
    )
    maker = llm._constraint_maker(structured(0, regex="a{4}"), [])
    constraint = maker()
    assert constraint is not None
    accept = constraint.accept
    monkeypatch.setattr(constraint, "accept", lambda t: events.append("token") or accept(t))
    engine.add_request("0", [10, 11], structured(0, regex="a{4}"), constraint=constraint)
    engine.dispatch()
    engine.step()
    engine.step()
    first = ["forward", "sample"]  # nothing to wait for
    assert events == [*first, "forward", "token", "sample", "forward", "token", "sample"]
    while engine.has_unfinished_requests:
        engine.step()


def test_a_reasoning_model_is_constrained_behind_its_reasoning(llm: LLM) -> None:
    import copy

    from jaxengine.structured.constraint_factory import ConstraintFactory

    other = copy.copy(llm)
    other._constraints = ConstraintFactory(
        llm.get_tokenizer(), 160, frozenset([EOS]), reasoning_parser="qwen3"
    )
    params = structured(1, choice=["yes"]).clone(thinking_token_budget=7, max_tokens=40)
    vocab = llm.get_tokenizer().get_vocab()
    params = params.clone(logit_bias={EOS: -100, vocab["<"]: -100})
    prompt = "<think>"
    (output,) = other.generate(prompt, params, use_tqdm=False)
    reasoning, content = output.outputs[0].text.split("</think>")
    assert content == "yes"
    assert len(llm.get_tokenizer().encode("</think>")) + 7 + len(
        llm.get_tokenizer().encode("yes")
    ) + 1 == len(output.outputs[0].token_ids)
    assert reasoning


def test_a_thinking_budget_needs_a_reasoning_parser(llm: LLM) -> None:
    with pytest.raises(ValueError, match="set --reasoning-parser to one of deepseek_r1, qwen3"):
        llm.generate("x", SamplingParams(thinking_token_budget=5), use_tqdm=False)


def test_an_unknown_reasoning_parser_is_refused_at_the_start(chat_model: Any) -> None:
    with pytest.raises(ValueError, match="reasoning_parser is 'magic'; known are deepseek_r1"):
        make_llm(chat_model, reasoning_parser="magic")


def test_several_devices_stages_and_replicas_give_what_one_device_does(chat_model: Any) -> None:
    found = run_on_virtual_devices("tests.structured_run", chat_model)
    one = found.pop("one")
    assert found == dict.fromkeys(["tp2 pp2", "dp2"], one)
    for (_, text), pattern in zip(one[:2], (r"([a-f]{2}-){8}", r"([a-z]{3} )+"), strict=True):
        assert re.match(pattern, text), text
