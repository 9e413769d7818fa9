"""Steps that write to the outputs of earlier ones give what steps with new arrays give."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.engine import build
from jaxengine.engine.device.output_buffers import MAX_ROWS, OutputBuffers
from jaxengine.engine.device.stage import Stage
from jaxengine.sharding import make_mesh
from tests.helpers import assert_idle, greedy, make_llm, output_ids, random_prompts

VOCAB_SIZE = 50


@pytest.fixture
def on_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines overwrite outputs as on a GPU."""
    monkeypatch.setattr(build, "overwrites_outputs", lambda parts: parts.is_last)


def make_buffers(max_in_flight: int = 2) -> OutputBuffers:
    mesh = make_mesh(jax.devices()[:1])
    return OutputBuffers(mesh, vocab_size=VOCAB_SIZE, dtype="float32", max_in_flight=max_in_flight)


def results(llm: LLM) -> list[Any]:
    prompts = random_prompts(3, 30, 9, 17, 1, 22, 5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 5, "temperature": 1.2, "top_k": 20, "logprobs": 3},
        {"seed": 6, "top_p": 0.9, "prompt_logprobs": 2},
    ]
    params = [
        SamplingParams(max_tokens=4 + 3 * i, ignore_eos=True, **kinds[i % 3])
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [
        (list(o.outputs[0].token_ids), o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs
    ]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_tokens_and_logprobs_are_the_same(
    async_scheduling: bool, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(make_llm(chat_model, async_scheduling=async_scheduling))
    monkeypatch.setattr(build, "overwrites_outputs", lambda parts: parts.is_last)
    llm = make_llm(chat_model, async_scheduling=async_scheduling)
    assert results(llm) == expected
    # Now with cached prefixes, so in other batches: the logprobs are equal but for rounding.
    assert [ids for ids, *_ in results(llm)] == [ids for ids, *_ in expected]


@pytest.mark.usefixtures("on_cpu_too")
def test_outputs_stay_where_they_are(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[tuple[int, int]] = []
    run = Stage.run

    def spy(self: Stage, *args: Any, **kwargs: Any) -> tuple[jax.Array, ...]:
        outputs = run(self, *args, **kwargs)
        if args[0].decode_only:
            addresses.append(tuple(o.unsafe_buffer_pointer() for o in outputs[:2]))
        return outputs

    monkeypatch.setattr(Stage, "run", spy)
    llm = make_llm(chat_model)
    llm.generate([[10, 11, 12], [20, 21, 22]], greedy(20), use_tqdm=False)
    assert len(addresses) > 15
    assert len({logits for _, logits in addresses}) == 1
    # One written, the others still being read by the host.
    assert len({ids for ids, _ in addresses}) == llm.engine.runner.max_in_flight + 1


@pytest.mark.usefixtures("on_cpu_too")
def test_a_step_that_fails_takes_nothing_along(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(chat_model)
    expected = output_ids(llm.generate([[10, 11, 12]], greedy(8), use_tqdm=False))
    buffers = llm.engine.runner.stages[0].output_buffers
    assert buffers is not None

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(buffers, "keep", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.generate([[10, 11, 12]], greedy(8), use_tqdm=False)
    assert output_ids(llm.generate([[10, 11, 12]], greedy(8), use_tqdm=False)) == expected


@pytest.mark.parametrize("max_in_flight", [1, 2, 5])
def test_token_ids_are_left_alone_until_the_host_has_read_them(max_in_flight: int) -> None:
    buffers = make_buffers(max_in_flight)
    unread: list[jax.Array] = []
    for _ in range(20):
        token_ids, logits = buffers.take(4)
        assert all(token_ids is not other for other in unread[-max_in_flight:])
        buffers.keep(token_ids, logits)
        unread.append(token_ids)


def test_every_number_of_rows_has_its_own() -> None:
    buffers = make_buffers()
    few, many = buffers.take(2), buffers.take(MAX_ROWS)
    assert [x.shape for x in few] == [(2,), (2, VOCAB_SIZE)]
    assert [x.shape for x in many] == [(MAX_ROWS,), (MAX_ROWS, VOCAB_SIZE)]
    buffers.keep(*few)
    assert buffers.take(2)[1] is few[1]
    assert not buffers.serves(MAX_ROWS + 1)


def test_the_account_of_bytes() -> None:
    buffers = make_buffers(max_in_flight=2)

    def held() -> Iterator[jax.Array]:
        for num_rows in (1, 8):
            token_ids, logits = buffers.take(num_rows)
            buffers.keep(token_ids, logits)
            yield logits
            yield from buffers._token_ids[num_rows]

    num_bytes = sum(array.nbytes for array in held())
    assert buffers.num_bytes([1, 8, MAX_ROWS + 1]) == num_bytes
    assert buffers.num_bytes([8, 1, 8]) == num_bytes


def test_new_ones_are_made_after_clear() -> None:
    buffers = make_buffers()
    token_ids, logits = buffers.take(3)
    buffers.keep(token_ids, logits)
    logits.delete()
    buffers.clear()
    np.testing.assert_array_equal(buffers.take(3)[1], np.zeros((3, VOCAB_SIZE)))


def test_what_is_allocated_is_told_and_shares_no_memory() -> None:
    buffers = make_buffers(max_in_flight=2)
    row_counts = [1, 4, 8, MAX_ROWS, MAX_ROWS + 1]
    buffers.allocate(row_counts)
    arrays = []
    for num_rows in row_counts[:-1]:
        logits = None
        for _ in range(3):  # as many token ids as there are
            token_ids, logits = buffers.take(num_rows)
            buffers.keep(token_ids, logits)
            arrays.append(token_ids)
        arrays.append(logits)
    addresses = {array.unsafe_buffer_pointer() for array in arrays}
    assert len(addresses) == len(arrays) == 4 * 4
    assert sum(array.nbytes for array in arrays) == buffers.num_bytes(row_counts)


@pytest.mark.usefixtures("on_cpu_too")
def test_an_engine_starts_with_all_outputs_that_it_will_write(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(chat_model)
    stage = llm.engine.runner.stages[0]
    assert stage.output_buffers is not None

    def fail(*_: object) -> None:
        raise AssertionError("memory was allocated in the middle of a run")

    monkeypatch.setattr(stage.output_buffers, "allocate", fail)
    results(llm)
