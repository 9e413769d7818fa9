"""SmolLM2-135M-Instruct in float32 gives the tokens and logits that transformers gave.

However the work is cut up: alone, in a batch, in chunks, after preemption, with cached prefixes,
and whether or not a step is dispatched before the last one is read.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxengine.llm import LLM
from tests.convert.tiny_gguf import demo_model
from tests.helpers import assert_idle, greedy, make_llm, output_ids, with_scheduler

REFERENCES = json.loads((Path(__file__).parent / "data/smollm2_references.json").read_text())
CASES: list[dict[str, Any]] = REFERENCES["cases"]
PROMPTS: list[list[int]] = [case["prompt_ids"] for case in CASES]
EXPECTED: list[list[int]] = [case["greedy_ids"] for case in CASES]
PARAMS = greedy(40)
IN_FLIGHT = pytest.mark.parametrize("max_in_flight", [1, 2], ids=["sync", "async"])


@pytest.fixture(scope="module")
def smollm() -> LLM:
    return make_llm(
        demo_model(),
        dtype="float32",
        max_num_seqs=3,
        max_num_batched_tokens=64,
        max_model_len=256,
        num_gpu_blocks_override=49,
    )


@pytest.mark.parametrize("case", range(3))
def test_a_prompt_alone_gives_the_reference_tokens(smollm: LLM, case: int) -> None:
    llm = with_scheduler(smollm, num_blocks=49)
    outputs = llm.generate([PROMPTS[case]], PARAMS, use_tqdm=False)
    assert output_ids(outputs) == [EXPECTED[case]]


def test_text_and_chat_messages_become_the_reference_prompts(smollm: LLM) -> None:
    llm = with_scheduler(smollm, num_blocks=49)
    plain = llm.generate([case["prompt"] for case in CASES[:2]], greedy(1), use_tqdm=False)
    chat = llm.chat(CASES[2]["messages"], greedy(1), use_tqdm=False)
    assert [output.prompt_token_ids for output in plain + chat] == PROMPTS
    assert chat[0].prompt == CASES[2]["prompt"]


@IN_FLIGHT
def test_a_batch_gives_the_reference_tokens(smollm: LLM, max_in_flight: int) -> None:
    llm = with_scheduler(smollm, num_blocks=49, max_in_flight=max_in_flight)
    assert output_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == EXPECTED


@pytest.mark.parametrize("case", range(3))
def test_first_step_logits_are_those_of_the_reference(smollm: LLM, case: int) -> None:
    llm = with_scheduler(smollm, num_blocks=49)
    params = greedy(1, logprobs=20)
    found = llm.generate([PROMPTS[case]], params, use_tqdm=False)[0].outputs[0].logprobs
    assert found is not None
    normalizer = CASES[case]["first_step_logsumexp"]
    for token_id, logit in CASES[case]["first_step_top10"]:
        assert abs(found[0][token_id].logprob + normalizer - logit) < 1e-3


@pytest.mark.parametrize(
    ("chunk_tokens", "max_in_flight"), [(3, 1), (16, 1), (16, 2), (17, 2), (32, 1)]
)
def test_chunked_prefill_gives_the_reference_tokens(
    smollm: LLM, chunk_tokens: int, max_in_flight: int
) -> None:
    llm = with_scheduler(
        smollm, num_blocks=49, max_in_flight=max_in_flight, max_num_batched_tokens=chunk_tokens
    )
    assert output_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == EXPECTED


def test_a_prompt_fed_token_by_token_gives_the_reference_tokens(smollm: LLM) -> None:
    llm = with_scheduler(smollm, num_blocks=49, long_prefill_token_threshold=1)
    assert output_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == EXPECTED


@IN_FLIGHT
def test_preempted_requests_give_the_reference_tokens(smollm: LLM, max_in_flight: int) -> None:
    # They need 3, 4 and 5 blocks of 16 tokens to the end; there are 7.
    llm = with_scheduler(smollm, num_blocks=8, max_in_flight=max_in_flight)
    assert output_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == EXPECTED
    assert llm.stats().num_preemptions > 0
    assert_idle(llm)


@IN_FLIGHT
def test_cached_prefixes_give_the_reference_tokens(smollm: LLM, max_in_flight: int) -> None:
    llm = with_scheduler(smollm, num_blocks=49, max_in_flight=max_in_flight)
    chat, expected = PROMPTS[2], EXPECTED[2]
    llm.generate([chat], PARAMS, use_tqdm=False)
    assert llm.stats().prefix_cache_hits == 0
    again = llm.generate([chat, chat + expected[:20]], PARAMS, use_tqdm=False)
    assert again[0].outputs[0].token_ids == expected
    assert again[1].outputs[0].token_ids[:20] == expected[20:]
    assert [output.num_cached_tokens for output in again] == [32, 48]
