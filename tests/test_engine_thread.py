"""EngineThread on a tiny model, without a cluster: one batch for the requests of many callers."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra: pip install 'jaxengine[ray]'")

from jaxengine import LLM, RequestOutput, RequestOutputKind
from jaxengine.engine_thread import EngineError, EngineThread
from tests.helpers import greedy, output_ids

TEXTS = ["the quick brown fox", "once upon a time there was", "pages of keys and values", "a small"]


@pytest.fixture
def engine(llm: LLM) -> Iterator[EngineThread]:
    engine = EngineThread(llm)
    yield engine
    engine.close()


@pytest.fixture
def slow_llm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Steps of 20 ms: 200 tokens last longer than any test looks at them."""
    step = llm.step

    def slow_step() -> list[RequestOutput]:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(llm, "step", slow_step)
    return llm


def final(max_tokens: int) -> Any:
    return greedy(max_tokens, output_kind=RequestOutputKind.FINAL_ONLY)


def wait_until(is_true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_are_those_of_generate_in_fewer_steps_than_one_by_one(llm: LLM) -> None:
    expected = output_ids(llm.generate(TEXTS, greedy(12), use_tqdm=False))
    engine = EngineThread(llm)
    alone = [engine.result(prompt=t, sampling_params=final(12)).result() for t in TEXTS]
    num_steps_alone = engine.num_steps
    together = [engine.result(prompt=text, sampling_params=final(12)) for text in TEXTS]
    assert output_ids([promised.result() for promised in together]) == expected
    assert output_ids(alone) == expected
    assert num_steps_alone >= 4 * 12
    assert engine.num_steps - num_steps_alone < num_steps_alone / 2
    engine.close()


def test_a_conversation_is_a_request_too(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the lazy dog"}]
    expected = output_ids(llm.chat(messages, greedy(6), use_tqdm=False))
    engine = EngineThread(llm)
    promised = engine.result(messages=messages, sampling_params=final(6))
    assert output_ids([promised.result()]) == expected
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a prompt or messages"),
        ({"prompt": "a", "messages": []}, "either a prompt or messages"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [5] * 300}, "leaves no room for output"),
        ({"prompt": 7}, "a prompt must be text"),
        ({"messages": ["hello"]}, "message 0 must be a dict"),
    ],
)
def test_a_bad_request_fails_alone(
    engine: EngineThread, arguments: dict[str, Any], message: str
) -> None:
    good = engine.result(prompt=TEXTS[0], sampling_params=final(8))
    with pytest.raises(ValueError, match=message):
        engine.result(**arguments).result()
    assert good.result().finished
    engine.check_health()


def test_a_failed_engine_tells_each_of_its_requests_and_all_later_ones(
    slow_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, is_broken = EngineThread(slow_llm), threading.Event()
    execute = slow_llm.engine.runner.execute

    def fail_when_broken(*step: Any) -> Any:
        if is_broken.is_set():
            raise RuntimeError("device lost")
        return execute(*step)

    monkeypatch.setattr(slow_llm.engine.runner, "execute", fail_when_broken)
    promised = [engine.result(prompt=text, sampling_params=final(200)) for text in TEXTS * 2]
    wait_until(lambda: engine.num_running == len(promised))  # 4 run, 4 wait
    is_broken.set()
    for each in promised:
        with pytest.raises(EngineError, match="RuntimeError: device lost"):
            each.result(timeout=30)
    with pytest.raises(EngineError, match="device lost"):
        engine.check_health()
    with pytest.raises(EngineError, match="device lost"):
        engine.result(prompt="too late")


def test_closing_a_stream_early_aborts_its_request(slow_llm: LLM) -> None:
    engine = EngineThread(slow_llm)

    async def read_two() -> int:
        stream = engine.stream(prompt=TEXTS[0], sampling_params=greedy(200))
        async with contextlib.aclosing(stream):
            await anext(stream)
            return len((await anext(stream)).outputs[0].token_ids)

    assert asyncio.run(read_two()) < 10
    wait_until(lambda: engine.num_running == 0)
    assert engine.num_steps < 100
    engine.close()


def test_a_cancelled_task_aborts_its_request(slow_llm: LLM) -> None:
    engine = EngineThread(slow_llm)

    async def wait_for_it() -> None:
        async for _ in engine.stream(prompt=TEXTS[0], sampling_params=final(200)):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(wait_for_it(), 0.5))
    wait_until(lambda: engine.num_running == 0)
    assert engine.num_steps < 100
    engine.close()


def test_a_caller_that_can_take_nothing_ends_only_its_own_request(engine: EngineThread) -> None:
    def refuse(news: RequestOutput | Exception) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(refuse, prompt=TEXTS[0], sampling_params=greedy(200))
    assert engine.result(prompt=TEXTS[1], sampling_params=final(8)).result().finished
    assert engine.num_running == 0
    engine.check_health()


def test_requests_that_run_when_it_is_closed_are_told(llm: LLM) -> None:
    engine = EngineThread(llm)
    promised = engine.result(prompt=TEXTS[0], sampling_params=final(200))
    engine.close()
    with pytest.raises(EngineError, match="the engine was closed"):
        promised.result()
