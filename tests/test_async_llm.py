"""AsyncLLM and EngineLoop on a tiny model: one batch for the coroutines of an event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from jaxengine import LLM, AsyncLLM, RequestOutput, SamplingParams
from jaxengine.engine_client import EngineDeadError, EngineNews, EngineRequest
from jaxengine.engine_loop import EngineLoop
from jaxengine.sampling_params import RequestOutputKind
from jaxengine.text.frontend import Frontend
from jaxengine.text.prompts import as_list
from tests.helpers import greedy, output_ids

TEXTS = ["the quick brown fox", "once upon a time there was", "pages of keys and values", "a small"]


def new_loop(llm: LLM) -> EngineLoop:
    return EngineLoop(llm.engine, llm._loaded.info, llm._loaded.new_constraint_factory())


@pytest.fixture
def served(llm: LLM) -> Iterator[AsyncLLM]:
    loaded = llm._loaded
    client = new_loop(llm).connect(owns_loop=True)
    served = AsyncLLM(client, Frontend(loaded.tokenizer, loaded.info))
    yield served
    served.shutdown()


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def failing(engine: Any, times: int) -> Callable[[], Any]:
    """A step that fails some times, as a real one does: all requests end."""
    calls, step = iter([True] * times), engine.step

    def fail_first() -> Any:
        if next(calls, False):
            engine.give_up_steps()
            raise MemoryError("no room on the device")
        return step()

    return fail_first


def test_coroutines_get_what_generate_gives(llm: LLM, served: AsyncLLM) -> None:
    expected = output_ids(llm.generate(TEXTS, greedy(12), use_tqdm=False))

    async def all_at_once() -> list[RequestOutput]:
        return await asyncio.gather(*(last(served.generate(t, greedy(12))) for t in TEXTS))

    assert output_ids(run(all_at_once())) == expected


def test_deltas_join_to_the_whole_of_every_one_of_n_outputs(served: AsyncLLM) -> None:
    params = SamplingParams(n=2, max_tokens=6, seed=3, ignore_eos=True)

    async def both() -> tuple[RequestOutput, list[RequestOutput]]:
        whole = await last(served.generate(TEXTS[0], params))
        delta = params.with_output_kind(RequestOutputKind.DELTA)
        return whole, [each async for each in served.generate(TEXTS[0], delta)]

    whole, pieces = run(both())
    for index in range(2):
        parts = [c for piece in pieces for c in piece.outputs if c.index == index]
        assert "".join(part.text for part in parts) == whole.outputs[index].text
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        assert token_ids == whole.outputs[index].token_ids


def test_a_reader_that_leaves_early_aborts_its_request(llm: LLM, served: AsyncLLM) -> None:
    async def leave() -> None:
        async with aclosing(served.generate(TEXTS[0], greedy(200))) as outputs:
            await anext(outputs)
        await served.call("stats")  # a step and a command later
        while (await served.call("stats")).num_held_blocks:
            await asyncio.sleep(0.01)

    run(leave())
    assert served.num_unfinished == 0


def test_an_aborted_request_ends_with_what_there_is(served: AsyncLLM) -> None:
    async def abort_after_the_first() -> list[RequestOutput]:
        outputs = []
        async for output in served.generate(TEXTS[0], greedy(200), "mine"):
            outputs.append(output)
            await served.abort("mine")
        return outputs

    outputs = run(abort_after_the_first())
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert len(outputs[-1].outputs[0].token_ids) >= 1


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5] * 300, greedy(1), "maximum context length"),
        ("", greedy(1), "the prompt is empty"),
        ([10_000], greedy(1), "not in the vocabulary"),
        (TEXTS[0], greedy(4, structured_outputs={"regex": "(?=a)b"}), "cannot be compiled"),
        (TEXTS[0], greedy(4, thinking_token_budget=3), "--reasoning-parser"),
    ],
)
def test_what_is_not_possible_is_refused(
    served: AsyncLLM, prompt: Any, params: SamplingParams, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(last(served.generate(prompt, params)))
    assert served.num_unfinished == 0


def test_a_grammar_holds_and_its_request_can_be_left_while_it_compiles(served: AsyncLLM) -> None:
    params = greedy(20, structured_outputs={"choice": ["fox", "hen"]}, ignore_eos=False)

    async def ask() -> str:
        leaving = asyncio.create_task(last(served.generate(TEXTS[0], params)))
        await asyncio.sleep(0)
        leaving.cancel()
        return (await last(served.generate(TEXTS[0], params))).outputs[0].text

    assert run(ask()) in ("fox", "hen")


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_run(
    llm: LLM, served: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.engine, "step", failing(llm.engine, 1))

    async def ask_twice() -> RequestOutput:
        with pytest.raises(EngineDeadError, match="no room on the device"):
            await last(served.generate(TEXTS[0], greedy(4)))
        await served.check_health()
        return await last(served.generate(TEXTS[0], greedy(4)))

    assert len(run(ask_twice()).outputs[0].token_ids) == 4


def test_two_failures_in_a_row_are_the_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = llm._loaded
    served = AsyncLLM(new_loop(llm).connect(owns_loop=True), Frontend(None, loaded.info))
    monkeypatch.setattr(llm.engine, "step", failing(llm.engine, 2))

    async def ask_twice() -> None:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="no room on the device"):
                await last(served.generate([5, 6], greedy(4, detokenize=False)))
        while not served.errored:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError):
            await last(served.generate([5, 6], greedy(4, detokenize=False)))

    run(ask_twice())
    assert not served.is_running


def test_paused_generation_waits_for_resume(served: AsyncLLM) -> None:
    async def ask() -> tuple[bool, RequestOutput]:
        await served.pause_generation()
        asked = asyncio.create_task(last(served.generate(TEXTS[0], greedy(2))))
        done, _ = await asyncio.wait([asked], timeout=0.2)
        await served.resume_generation()
        return bool(done), await asked

    was_done, output = run(ask())
    assert not was_done
    assert output.finished


def test_two_clients_of_a_loop_may_use_the_same_names(llm: LLM) -> None:
    loop = new_loop(llm)
    clients = [loop.connect(), loop.connect()]
    prompts = [each.token_ids for each in llm._frontend.encode(as_list(TEXTS[:2]))]
    expected = output_ids(llm.generate(TEXTS[:2], greedy(5), use_tqdm=False))
    tokens: list[list[int]] = [[], []]
    for client, found, prompt in zip(clients, tokens, prompts, strict=True):

        def listen(news: EngineNews, found: list[int] = found) -> None:
            for output in news.step.outputs:
                assert output.request_id == "same"
                found.extend(output.new_token_ids)

        client.listen(listen)
        client.add([EngineRequest("same", prompt, greedy(5))])
    loop.put(lambda: None)
    for _ in range(600):
        if [len(found) for found in tokens] == [5, 5]:
            break
        asyncio.run(asyncio.sleep(0.05))
    loop.close()
    assert tokens == expected
