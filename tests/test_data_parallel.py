"""Data parallelism: replicas give the tokens of one engine, share the work, and none waits."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.cli.main import generate_parser
from jaxengine.config import EngineConfig
from jaxengine.engine import replicas
from jaxengine.engine.engine import Engine
from jaxengine.engine.replica_router import ReplicaRouter
from jaxengine.engine.replicas import (
    ReplicaGroup,
    split_devices,
    startup_text,
    sum_stats,
)
from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput, SchedulerStats
from jaxengine.outputs import RequestOutput
from jaxengine.request_loop import RequestLoop
from tests.helpers import (
    assert_idle,
    greedy,
    make_llm,
    output_ids,
    random_prompts,
    run_on_virtual_devices,
    save_tiny_chat_model,
)
from tests.replicas_run import LAYOUTS, PROMPTS

# On 8 virtual devices, in a program of its own


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    model = save_tiny_chat_model(tmp_path_factory.mktemp("replicated"), num_hidden_layers=2)
    return run_on_virtual_devices("tests.replicas_run", model)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("kind", ["greedy", "random"])
def test_replicas_give_the_tokens_of_one_engine(results: dict, layout: str, kind: str) -> None:
    assert results[layout][kind] == results[LAYOUTS[0]][kind]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_replica_gets_its_share_of_the_work(results: dict, layout: str) -> None:
    tp, pp, dp = map(int, layout.split(" x "))
    assert results[layout]["num_devices"] == tp * pp * dp
    shares = results[layout]["prompt_tokens"]
    assert len(shares) == dp
    assert sum(shares) == 2 * sum(map(len, PROMPTS))
    assert max(shares) < 2 * min(shares)


# Two engines on one device, as a group


@pytest.fixture(scope="module")
def second(chat_model: Path) -> LLM:
    return make_llm(chat_model)


@pytest.fixture
def pair(llm: LLM, second: LLM) -> Iterator[LLM]:
    """``llm`` and a second one like it as replicas; afterwards nothing may be left over in them."""
    second.reset_prefix_cache()
    group = ReplicaGroup([llm.engine, second.engine])
    both = copy.copy(llm)
    both.engine = group
    both._requests = RequestLoop(group, llm._frontend.processor)
    yield both
    while group.has_unfinished_requests:
        group.step()  # dispatched before the last request ended; nobody waits for it
    assert group._router.loads == [0, 0]
    assert_idle(second)


def generate(llm: LLM, prompts: Sequence, params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def shares(llm: LLM) -> list[int]:
    return [replica.scheduler._num_scheduled_steps for replica in llm.engine.replicas]


def test_a_group_serves_what_one_engine_serves(llm: LLM, pair: LLM) -> None:
    before = shares(pair)
    params = greedy(12, logprobs=2, prompt_logprobs=1)
    for found, expected in zip(
        generate(pair, PROMPTS, params), generate(llm, PROMPTS, params), strict=True
    ):
        assert found.prompt_token_ids == expected.prompt_token_ids
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        for ours, theirs in (
            (found.outputs[0].logprobs, expected.outputs[0].logprobs),
            (found.prompt_logprobs[1:], expected.prompt_logprobs[1:]),
        ):
            assert [list(each) for each in ours] == [list(each) for each in theirs]
            np.testing.assert_allclose(values(ours), values(theirs), atol=1e-4)
    assert all(now > then for now, then in zip(shares(pair), before, strict=True))


def values(logprobs: Sequence[dict]) -> list[float]:
    return [entry.logprob for position in logprobs for entry in position.values()]


def test_the_n_outputs_of_a_prompt_may_come_from_different_replicas(llm: LLM, pair: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    (found,), (expected,) = (generate(each, [PROMPTS[0]], params) for each in (pair, llm))
    assert [each.token_ids for each in found.outputs] == [
        each.token_ids for each in expected.outputs
    ]


def test_a_stop_string_ends_a_request_wherever_it_lives(llm: LLM, pair: LLM) -> None:
    free = generate(llm, PROMPTS, greedy(16))
    stops = [output.outputs[0].text[4:7] for output in free]
    params = greedy(16, stop=stops)
    found, expected = generate(pair, PROMPTS, params), generate(llm, PROMPTS, params)
    assert [each.outputs[0].text for each in found] == [each.outputs[0].text for each in expected]
    assert {each.outputs[0].finish_reason for each in found} == {"stop"}
    assert {each.outputs[0].stop_reason for each in found} <= set(stops)


def test_open_streams_on_both_replicas_and_one_that_is_closed(llm: LLM, pair: LLM) -> None:
    expected = output_ids(generate(llm, PROMPTS[:3], greedy(10)))
    streams = [pair.stream(prompt, greedy(10)) for prompt in PROMPTS[:3]]
    latest: dict[int, RequestOutput] = {}
    for number in (0, 1, 2):
        latest[number] = next(streams[number])
    assert all(pair.engine._router.loads)
    streams[1].close()
    for number in (0, 2):
        for output in streams[number]:
            latest[number] = output
    assert output_ids([latest[0], latest[2]]) == [expected[0], expected[2]]


def test_prefix_caches_are_reset_together_and_not_while_requests_run(pair: LLM) -> None:
    prompts = random_prompts(40, 40)
    generate(pair, prompts, greedy(2))
    assert [each.num_cached_tokens for each in generate(pair, prompts, greedy(2))] == [32, 32]
    stream = pair.stream(PROMPTS[0], greedy(30))
    next(stream)
    assert not pair.reset_prefix_cache()
    stream.close()
    assert [each.num_cached_tokens for each in generate(pair, prompts, greedy(2))] == [32, 32]
    assert pair.reset_prefix_cache()
    assert [each.num_cached_tokens for each in generate(pair, prompts, greedy(2))] == [0, 0]


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), KeyboardInterrupt()])
def test_a_replica_that_fails_ends_all_requests_and_the_group_goes_on(
    pair: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    expected = output_ids(generate(pair, PROMPTS, greedy(10)))
    runner = pair.engine.replicas[1].runner
    execute, steps = runner.execute, itertools.count()

    def fail_at_the_fourth(*step: Any) -> Any:
        if next(steps) == 3:
            raise error
        return execute(*step)

    monkeypatch.setattr(runner, "execute", fail_at_the_fourth)
    with pytest.raises(type(error)):
        generate(pair, PROMPTS, greedy(10))
    for replica in pair.engine.replicas:
        assert not replica.has_unfinished_requests
        assert replica.scheduler.block_pool.num_held_blocks == 0
    assert pair.engine._router.loads == [0, 0]
    again = generate(pair, PROMPTS, greedy(10))
    assert output_ids(again) == expected
    assert {output.num_cached_tokens for output in again} == {0}


def test_a_random_request_gets_the_same_tokens_on_every_replica(llm: LLM, second: LLM) -> None:
    received = []
    for engine in (llm.engine, second.engine):
        group = ReplicaGroup([engine])
        params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
        request = group.add_request("a name", PROMPTS[0], params)
        while group.has_unfinished_requests:
            group.step()
        received.append(request.output_token_ids)
    assert received[0] == received[1]


def test_a_name_in_use_on_any_replica_is_refused(pair: LLM) -> None:
    group = pair.engine
    group.add_request("a", [10] * 9, greedy(4))
    with pytest.raises(ValueError, match="'a' is in use"):
        group.add_request("a", [10], greedy(1))
    with pytest.raises(ValueError, match="token id 999 is not in the vocabulary"):
        group.add_request("b", [999], greedy(1))
    assert group._router.loads == [13, 0]
    group.abort("a")
    group.abort("never heard of")
    group.finish("nor of this", None)


# Routing and the order of steps, without a device


def output(request_id: str, finished: bool = False) -> EngineCoreOutput:
    reason: Any = "stop" if finished else None
    return EngineCoreOutput(request_id, [1], reason, None, 0, 0)


def test_a_request_goes_to_the_replica_with_the_fewest_unfinished_tokens() -> None:
    router = ReplicaRouter(3)
    chosen = []
    for name, num_tokens in (("long", 100), ("a", 30), ("b", 10), ("c", 10), ("d", 10), ("e", 1)):
        chosen.append(router.choose())
        router.place(name, chosen[-1], num_tokens)
    assert chosen == [0, 1, 2, 2, 2, 1]  # of equals the lowest
    assert router.loads == [100, 31, 30]
    assert router.find("c") == 2
    router.record([output("long")] * 3 + [output("a", finished=True)])
    assert router.loads == [97, 1, 30]
    assert router.remove("long") == 0
    assert router.remove("long") is None
    assert router.loads == [0, 1, 30]
    router.clear()
    assert (router.loads, router.find("c")) == ([0, 0, 0], None)


class FakeTokens:
    """Token ids whose arrival the test decides."""

    def __init__(self, num_rows: int, is_ready: Callable[[], bool]) -> None:
        self.num_rows, self.is_ready = num_rows, is_ready


@dataclasses.dataclass
class FakeStep:
    """A step of a replica that has no device; notes when it is read."""

    scheduler_output: Any
    sampled: Any
    on_read: Callable[[], None]
    prompt_scores: None = None

    def logprobs(self) -> None:
        return None

    def token_ids(self) -> np.ndarray:
        self.on_read()
        return np.zeros(self.sampled.token_ids.num_rows, np.int32)


class FakeRunner:
    """Notes what is dispatched and read in a log that several share."""

    def __init__(self, name: str, log: list[str], is_ready: Callable[[], bool]) -> None:
        self.name, self.log, self.is_ready = name, log, is_ready
        self.num_restored = 0

    def execute(self, step: Any) -> FakeStep:
        self.log.append(f"dispatch {self.name}")
        tokens = FakeTokens(len(step.rows), self.is_ready)
        sampled = SimpleNamespace(token_ids=tokens)
        return FakeStep(step, sampled, lambda: self.log.append(f"read {self.name}"))

    def restore_state(self) -> None:
        self.num_restored += 1


def fake_group(log: list[str], *is_ready: Callable[[], bool]) -> ReplicaGroup:
    """Replicas "0", "1", ... that share a log."""
    replicas = []
    for number, ready in enumerate(is_ready):
        scheduler = Scheduler(
            block_pool=BlockPool(33, 16),
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=128,
        )
        model: Any = SimpleNamespace(vocab_size=100)
        runner: Any = FakeRunner(str(number), log, ready)
        ids = frozenset[int]()
        engine = Engine(scheduler, runner, model_config=model, eos_token_ids=ids)
        replicas.append(engine)
    return ReplicaGroup(replicas)


def run(group: ReplicaGroup, *num_tokens: int) -> None:
    for number, length in enumerate(num_tokens):
        group.add_request(str(number), [5], greedy(length))
    while group.has_unfinished_requests:
        group.step()


def test_all_replicas_have_two_steps_before_any_is_read_and_then_take_turns() -> None:
    log: list[str] = []
    run(fake_group(log, lambda: True, lambda: True), 4, 4)
    first = ["dispatch 0", "dispatch 0", "dispatch 1", "dispatch 1"]
    turns = ["read 0", "dispatch 0", "read 1", "dispatch 1"] * 2
    assert log == [*first, *turns, "read 0", "read 1", "read 0", "read 1"]


def test_a_slow_replica_keeps_nobody_waiting_and_is_awaited_when_it_is_alone() -> None:
    log: list[str] = []
    run(fake_group(log, lambda: False, lambda: True), 3, 12)
    reads = [entry for entry in log if entry.startswith("read")]
    assert reads == ["read 1"] * 12 + ["read 0"] * 3


def test_whoever_is_ready_first_is_read_first() -> None:
    log: list[str] = []
    polls = itertools.count()
    group = fake_group(log, lambda: next(polls) >= 3, lambda: next(polls) >= 2)
    for name in ("a", "b"):
        group.add_request(name, [5], greedy(2))
    (news,) = group.step().outputs
    # Polls 0 and 1 find neither; the second round asks replica 0 first.
    assert (news.request_id, next(polls)) == ("b", 4)


def test_if_no_step_gets_done_one_is_awaited_which_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "PATIENCE_S", 0.01)
    log: list[str] = []
    run(fake_group(log, lambda: False, lambda: False), 2, 2)
    reads = [entry for entry in log if entry.startswith("read")]
    assert reads == ["read 0", "read 1", "read 0", "read 1"]


def test_replicas_that_are_always_ready_starve_no_other() -> None:
    log: list[str] = []
    run(fake_group(log, *[lambda: True] * 3), 10, 10, 10)
    reads = [entry for entry in log if entry.startswith("read")]
    assert reads == ["read 0", "read 1", "read 2"] * 10


def test_all_replicas_are_given_up_even_if_giving_up_one_fails() -> None:
    log: list[str] = []
    group = fake_group(log, lambda: True, lambda: True, lambda: True)
    runners: list[Any] = [replica.runner for replica in group.replicas]

    def fail(*_: object) -> None:
        raise OSError("no such device")

    runners[1].execute = runners[1].restore_state = fail
    with pytest.raises(OSError, match="no such device"):
        run(group, 3, 3, 3)
    assert [runners[0].num_restored, runners[2].num_restored] == [1, 1]
    assert not group.has_unfinished_requests


def test_an_idle_group_steps_without_effect() -> None:
    log: list[str] = []
    assert fake_group(log, lambda: True, lambda: False).step().outputs == []
    assert log == []


# Start and statistics


def config(**sizes: int) -> EngineConfig:
    return EngineConfig("model", **{f"{name}_parallel_size": n for name, n in sizes.items()})


def test_replicas_get_neighbouring_devices() -> None:
    devices: Any = list(range(9))
    assert split_devices(config(data=2, tensor=2, pipeline=2), devices) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert split_devices(config(data=3), devices) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 4, "tensor": 2},
            "size 2 x pipeline_parallel_size 1 x data_parallel_size 4 needs 8 devices but there "
            "are 5: use a data_parallel_size of at most 2",
        ),
        ({"data": 2, "tensor": 2, "pipeline": 4}, "needs 16 devices .* 5: lower tensor_parallel"),
    ],
    ids=str,
)
def test_too_few_devices_are_named_with_the_sizes_that_fit(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_devices(config(**sizes), jax.devices() * 5)


def test_the_flag_has_a_short_form() -> None:
    options = generate_parser().parse_args(["m", "Hi", "-dp", "3"])
    assert options.data_parallel_size == 3


def test_more_replicas_than_devices_are_refused(chat_model: Path) -> None:
    with pytest.raises(ValueError, match="data_parallel_size 64 needs 64 devices"):
        make_llm(chat_model, data_parallel_size=64)


def test_one_replica_is_the_engine_itself(llm: LLM) -> None:
    assert type(llm.engine) is Engine


def test_the_report_of_the_start_shows_the_smallest_cache(llm: LLM) -> None:
    budget = dataclasses.replace(llm.startup.budget, num_blocks=17)
    smaller = dataclasses.replace(llm.startup, budget=budget)
    assert startup_text([llm.startup]) == llm.startup.text()
    text = startup_text([llm.startup, smaller, llm.startup])
    assert text == f"3 replicas, each with at least:\n{smaller.text()}"
    assert "17 blocks of 16 tokens" in text


def test_statistics_are_those_of_all_replicas_together() -> None:
    def stats(held: int, waste: float, average: float) -> SchedulerStats:
        return SchedulerStats(1, 2, held, 100, waste, average, 30, 10, 4)

    total = sum_stats([stats(30, 0.1, 0.2), stats(10, 0.5, 0.4), stats(0, 0.0, 0.0)])
    assert (total.num_running, total.num_waiting, total.num_preemptions) == (3, 6, 12)
    assert (total.prefix_cache_queries, total.prefix_cache_hits) == (90, 30)
    assert (total.kv_cache_usage, total.num_held_blocks) == (40 / 300, 40)
    assert total.kv_waste == pytest.approx((0.1 * 30 + 0.5 * 10) / 40)
    assert total.kv_waste_average == pytest.approx(0.3)
    assert sum_stats([stats(0, 0.0, 0.0)]).kv_waste_average == 0
