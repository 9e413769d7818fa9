"""The compiled step: no copy of the cache, one transfer, one trace for layers of a kind."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.batch import StepShape
from jaxengine.models.decoder import DecoderLayer
from tests.helpers import greedy, make_llm, random_prompts

MIXED = StepShape(16, 4, decode_only=False)
DECODE = StepShape(4, 4, decode_only=True)
SHAPES = pytest.mark.parametrize("shape", [MIXED, DECODE], ids=["mixed", "decode"])
NUM_BLOCKS = 4097
CACHE_BYTES = NUM_BLOCKS * 2 * 3 * 2 * 16 * 8 * 4  # k and v, layers, heads, slots, head_dim, bytes


@pytest.fixture(scope="module")
def large_cache_llm(chat_model: Any) -> LLM:
    return make_llm(chat_model, num_gpu_blocks_override=NUM_BLOCKS)


@SHAPES
def test_the_step_updates_the_cache_in_place(large_cache_llm: LLM, shape: StepShape) -> None:
    compiled = large_cache_llm.engine.runner.stages[0].program(shape)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= CACHE_BYTES
    assert memory.temp_size_in_bytes < CACHE_BYTES / 50
    cache = re.escape(f"f32[{NUM_BLOCKS},2,16,8]")
    assert re.search(cache, compiled.as_text())
    assert not re.search(rf"= {cache}\S* copy", compiled.as_text())


def test_old_caches_tables_and_tokens_are_given_up(large_cache_llm: LLM) -> None:
    (stage,) = large_cache_llm.engine.runner.stages
    before = jax.tree.leaves(stage.state)
    large_cache_llm.generate([[10, 11, 12]], greedy(2), use_tqdm=False)
    assert len(before) == 8
    assert all(array.is_deleted() for array in before)


class Transfers:
    """Counts what each step sends to the device; anything it would send unseen is an error."""

    def __init__(self, runner: Any, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[int]] = []
        (stage,) = runner.stages
        patch.setattr(runner, "execute", functools.partial(self._execute, runner.execute))
        patch.setattr(stage, "program", functools.partial(self._program, stage.program))
        sample = runner._samplers.sample
        patch.setattr(runner._samplers, "sample", self._sending(sample))

    def _execute(self, execute: Callable, step: Any) -> Any:
        self.steps.append([])
        with jax.transfer_guard_host_to_device("disallow"):
            return execute(step)

    def _program(self, program: Callable, *key: Any) -> Callable:
        with jax.transfer_guard_host_to_device("allow"):  # compiling makes constants
            return self._sending(program(*key))

    def _sending(self, function: Callable) -> Callable:
        def send(*arguments: Any, **options: Any) -> Any:
            return function(*map(self._put, arguments), **options)

        return send

    def _put(self, value: Any) -> Any:
        """Put every host array of an argument on the device."""
        return jax.tree.map(self._put_array, value)

    def _put_array(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        self.steps[-1].append(value.nbytes)
        return jax.device_put(value)


@pytest.fixture
def transfers(llm: LLM) -> Iterator[Transfers]:
    llm.generate(random_prompts(20, 5), SamplingParams(max_tokens=4), use_tqdm=False)  # compile
    with pytest.MonkeyPatch.context() as patch:
        yield Transfers(llm.engine.runner, patch)


def test_a_greedy_step_sends_one_array(llm: LLM, transfers: Transfers) -> None:
    llm.generate(random_prompts(20, 5, 33, 7, 9), greedy(20), use_tqdm=False)
    assert len(transfers.steps) > 20
    assert {len(sent) for sent in transfers.steps} == {1}
    assert max(sent[0] for sent in transfers.steps) <= 4 * MIXED.packed_size


def test_a_sampling_step_sends_one_array_more(llm: LLM, transfers: Transfers) -> None:
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    llm.generate(random_prompts(20, 5), params, use_tqdm=False)
    counts = Counter(len(sent) for sent in transfers.steps)
    assert counts[2] >= 20  # a step that samples nothing, inside a prompt, sends one
    assert set(counts) <= {1, 2}


def test_layers_of_a_kind_are_traced_once(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    call = DecoderLayer.__call__

    def count(self: Any, *args: Any) -> Any:
        calls.append(self)
        return call(self, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", count)
    llm = make_llm(chat_model, num_gpu_blocks_override=77)  # a cache not traced before
    llm.engine.runner.stages[0].program(DECODE)
    assert len(calls) == 1
    # In a mixed step the last of the three layers is of another kind: it serves last tokens only.
    llm.engine.runner.stages[0].program(MIXED)
    assert len(calls) == 3
