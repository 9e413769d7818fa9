"""Random workloads: whatever happens around it, a request gets the tokens it would get alone."""

import random
from dataclasses import dataclass, field

import pytest

from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.request import FinishReason, Request
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from jaxengine.sampling_params import SamplingParams
from tests.engine.fake_device import VOCAB_SIZE, FakeDevice, tokens_alone

NUM_REQUESTS = 40
MAX_MODEL_LEN = 64


@dataclass
class Workload:
    """An engine with a random configuration, and everything that was asked of it."""

    seed: int
    finished: dict[str, Request] = field(default_factory=dict)
    received: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        block_size = rng.choice([1, 2, 4, 8])
        self.window = rng.choice([None, None, rng.randint(1, 24)])
        num_blocks = 1 + rng.randint(MAX_MODEL_LEN // 2, 4 * MAX_MODEL_LEN) // block_size
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=rng.random() < 0.8)
        num_slots = rng.randint(1, 12)
        chunked = rng.random() < 0.8
        self.scheduler = Scheduler(
            block_pool=self.pool,
            max_num_seqs=num_slots,
            max_num_batched_tokens=rng.randint(1, 48) if chunked else MAX_MODEL_LEN,
            max_model_len=MAX_MODEL_LEN,
            enable_chunked_prefill=chunked,
            long_prefill_token_threshold=rng.choice([0, 0, rng.randint(1, 16)]),
            policy=rng.choice(["fcfs", "priority"]),
            watermark=rng.choice([0.0, 0.01, 0.2]),
            max_in_flight=rng.choice([1, 2, 2, 3, 6]),
            num_stages=rng.choice([1, 1, 2, 4]),
            sliding_window=self.window,
        )
        self.device = FakeDevice(num_blocks, block_size, num_slots, MAX_MODEL_LEN, self.window)
        self.in_flight: list[tuple[SchedulerOutput, list[int]]] = []
        self.prefixes = [self.random_tokens(rng.randint(1, 40)) for _ in range(3)]
        self.to_come = [self.make_request(i) for i in range(NUM_REQUESTS)]

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB_SIZE) for _ in range(count)]

    def make_request(self, index: int) -> Request:
        rng = self.rng
        prompt = rng.choice([[], *self.prefixes]) + self.random_tokens(rng.randint(0, 12))
        max_tokens = rng.choice([None, rng.randint(1, 40)])
        return Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=max_tokens,
                seed=rng.choice([0, 0, index]),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=rng.choice([None, [3]]),
                min_tokens=0 if max_tokens is None else rng.randint(0, max_tokens) // 2,
                prompt_logprobs=rng.choice([None, None, None, 0]),
            ),
            eos_token_ids=frozenset([1]),
            arrival_time=float(index),
            priority=rng.randint(0, 2),
            cache_salt=rng.choice([None, None, "salt"]),
        )

    def run(self) -> None:
        """Add, abort, schedule and update in random order until all is done."""
        while self.to_come or self.scheduler.has_unfinished_requests or self.in_flight:
            if self.to_come and self.rng.random() < 0.5:
                self.add(self.to_come.pop())
            if self.rng.random() < 0.02:
                self.end_one(self.rng.choice([FinishReason.ABORT, FinishReason.STOP]))
            if not self.step():
                assert self.to_come or not self.scheduler.has_unfinished_requests, "deadlock"
            self.scheduler.check_integrity()

    def step(self) -> bool:
        """Schedule or update; return whether either was possible."""
        if self.rng.random() < 0.7 and self.schedule():
            return True
        if self.in_flight:
            self.update()
            return True
        return self.schedule()

    def schedule(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.check_step(step)
        self.in_flight.append((step, self.device.run(step)))
        return True

    def check_step(self, step: SchedulerOutput) -> None:
        counts = [row.num_scheduled_tokens for row in step.rows]
        assert sum(counts) == step.num_scheduled_tokens <= self.scheduler.max_num_batched_tokens
        assert all((count == 1) == (i < step.num_decode_rows) for i, count in enumerate(counts))

    def update(self) -> None:
        step, tokens = self.in_flight.pop(0)
        for output in self.scheduler.update_from_output(step, tokens):
            self.received.setdefault(output.request_id, []).extend(output.new_token_ids)

    def add(self, request: Request) -> None:
        block_size = self.pool.block_size
        try:
            self.scheduler.add_request(request)
        except ValueError:
            num_blocks = -(-request.num_prompt_tokens // block_size)
            too_long = num_blocks > self.pool.num_usable_blocks
            assert request.num_prompt_tokens == 0 or too_long
        else:
            self.finished[request.request_id] = request  # once the run is over

    def end_one(self, reason: FinishReason) -> None:
        request_ids = [i for i, request in self.finished.items() if not request.is_finished]
        if request_ids:
            self.scheduler.finish(self.rng.choice(request_ids), reason, "by hand")

    def check(self) -> None:
        """Compare every request with its run alone, and the pool with a new one."""
        assert self.pool.num_free_blocks == self.pool.num_usable_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.scheduler.stats().kv_waste == 0
        self.pool.check_integrity([])
        for request in self.finished.values():
            tokens = request.output_token_ids
            assert tokens == self.received.get(request.request_id, [])
            seed, prompt = request.sampling_params.seed, request.prompt_token_ids
            assert tokens == tokens_alone(prompt, len(tokens), seed, self.window)
            self.check_end(request)

    def check_end(self, request: Request) -> None:
        """The request ended where it should have, no earlier and no later."""
        params, tokens = request.sampling_params, request.output_token_ids
        ends = set(params.stop_token_ids or []) | (set() if params.ignore_eos else {1})
        stops = [i for i, t in enumerate(tokens, start=1) if t in ends and i >= params.min_tokens]
        if request.stop_reason == "by hand":
            assert not stops
        elif request.finish_reason is FinishReason.STOP:
            assert stops == [len(tokens)]
        else:
            assert request.finish_reason is FinishReason.LENGTH
            assert not stops
            limits = [
                MAX_MODEL_LEN,
                params.max_tokens and request.num_prompt_tokens + params.max_tokens,
            ]
            usable = self.pool.num_usable_blocks * self.pool.block_size + 1
            assert request.num_tokens in [*limits, usable]


@pytest.mark.parametrize("seed", range(200))
def test_every_request_ends_with_the_tokens_it_would_get_alone(seed: int) -> None:
    workload = Workload(seed)
    workload.run()
    workload.check()


def test_the_stress_meets_preemptions_prefix_hits_and_late_tokens() -> None:
    preempted, hits, ended = 0, 0, set()
    for seed in range(12):
        workload = Workload(seed)
        workload.run()
        stats = workload.scheduler.stats()
        preempted += stats.num_preemptions
        hits += stats.prefix_cache_hits
        ended |= {request.finish_reason for request in workload.finished.values()}
    assert preempted > 20
    assert hits > 200
    assert ended == set(FinishReason)
