"""Packed by the host and unpacked on the device, a step is what the scheduler chose."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.batch import InputBatch, build_input_batch, split_packed, update_tables
from jaxengine.engine.device.batch_builder import BatchBuilder, table_updates
from jaxengine.engine.device.buckets import Buckets
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from tests.engine.helpers import add, make_request, make_scheduler, run_step, schedule

BLOCK_SIZE = 8
MAX_NUM_SEQS = 4
MAX_MODEL_LEN = 96


class Device:
    """The device's side of a step without a model: tables and newest tokens."""

    def __init__(self) -> None:
        width = MAX_MODEL_LEN // BLOCK_SIZE
        self.tables = jnp.zeros((MAX_NUM_SEQS + 1, width), jnp.int32)
        self.last_tokens = jnp.arange(900, 900 + MAX_NUM_SEQS, dtype=jnp.int32)
        self.buckets = Buckets(
            max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=24, min_mixed_tokens=16
        )
        self.builder = BatchBuilder(MAX_NUM_SEQS)

    def unpack(self, step: SchedulerOutput) -> InputBatch:
        shape = self.buckets.choose(step.num_scheduled_tokens, len(step.rows))
        packed, overflow = self.builder.build(step, shape, is_greedy=True)
        if overflow is not None:
            self.tables = update_tables(self.tables, *jnp.array(overflow))
        parts = split_packed(shape, jnp.array(packed))
        names = ("table_rows", "table_columns", "table_blocks")
        self.tables = update_tables(self.tables, *(parts[name] for name in names))
        return build_input_batch(shape, parts, self.tables, self.last_tokens, BLOCK_SIZE)


def check(batch: InputBatch, step: SchedulerOutput, last_tokens: np.ndarray) -> None:
    """Compare with loops over rows and tokens."""
    first = 0
    for index, row in enumerate(step.rows):
        request, count = row.request, row.num_scheduled_tokens
        end = row.num_computed_tokens + count
        assert batch.seq_lens[index] == end
        assert batch.query_start_loc[index] == first
        num_blocks = -(-end // BLOCK_SIZE)
        assert batch.block_tables[index, :num_blocks].tolist() == request.block_ids[:num_blocks]
        for token, position in enumerate(range(row.num_computed_tokens, end), start=first):
            block = request.block_ids[position // BLOCK_SIZE]
            assert batch.positions[token] == position
            assert batch.slot_mapping[token] == block * BLOCK_SIZE + position % BLOCK_SIZE
            expected = (
                last_tokens[request.slot]
                if row.is_token_on_device
                else request.all_token_ids[position]
            )
            assert batch.token_ids[token] == expected
        first += count
        assert batch.logits_indices[index] == first - 1
    assert batch.query_start_loc[len(step.rows)] == first
    assert batch.num_decode_rows == step.num_decode_rows
    assert (np.asarray(batch.seq_lens)[len(step.rows) :] == 0).all()
    assert (np.asarray(batch.slot_mapping)[first:] < BLOCK_SIZE).all(), "padding: the null block"


def make(**limits: int) -> Scheduler:
    return make_scheduler(
        num_blocks=limits.pop("num_blocks", 40),
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=24,
        max_model_len=MAX_MODEL_LEN,
        **limits,
    )


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_random_steps_are_unpacked_to_what_was_scheduled(max_in_flight: int) -> None:
    rng = random.Random(max_in_flight)
    scheduler = make(num_blocks=24, max_in_flight=max_in_flight)
    device, in_flight, chunks_beside_decode, tokens_on_device = Device(), [], 0, 0
    for number in range(12):
        prompt = [100 * number + i for i in range(rng.randint(1, 60))]
        add(scheduler, make_request(str(number), prompt, max_tokens=rng.randint(1, 30)))
    for _ in range(60):
        if (step := scheduler.schedule()) is not None:
            check(device.unpack(step), step, np.asarray(device.last_tokens))
            chunks_beside_decode += 0 < step.num_decode_rows < len(step.rows)
            tokens_on_device += any(row.is_token_on_device for row in step.rows)
            in_flight.append(step)
        if in_flight and (step is None or len(in_flight) == max_in_flight):
            oldest = in_flight.pop(0)
            scheduler.update_from_output(oldest, [7] * len(oldest.rows))
    assert chunks_beside_decode > 0
    assert (tokens_on_device > 0) == (max_in_flight == 2)


def test_table_updates_that_do_not_fit_are_handed_back() -> None:
    scheduler = make()
    prompt = list(range(80))
    add(scheduler, make_request("first", prompt, max_tokens=2))
    while scheduler.has_unfinished_requests:
        run_step(scheduler)
    # Its nine cached blocks come back at once, for a step of eight tokens.
    add(scheduler, make_request("again", prompt, max_tokens=2))
    step = schedule(scheduler)
    device = Device()
    shape = device.buckets.choose(step.num_scheduled_tokens, len(step.rows))
    packed, overflow = device.builder.build(step, shape, is_greedy=True)
    assert overflow is not None
    assert overflow.shape[1] == 10 > shape.num_table_updates
    rows = split_packed(shape, jnp.array(packed))["table_rows"]
    assert (rows == MAX_NUM_SEQS + 1).all(), "nothing is written by the step itself"
    check(device.unpack(step), step, np.asarray(device.last_tokens))


def test_table_updates_name_row_column_and_block() -> None:
    scheduler = make()
    add(scheduler, make_request("a", 10), make_request("b", 3))
    assert table_updates(schedule(scheduler)).tolist() == [[0, 0, 1], [0, 1, 0], [1, 2, 3]]


def test_a_step_without_new_blocks_has_no_table_updates() -> None:
    scheduler = make()
    add(scheduler, make_request("a", 3))
    run_step(scheduler)
    assert table_updates(schedule(scheduler)).shape == (3, 0)


@pytest.mark.parametrize("is_greedy", [False, True])
def test_the_step_says_whether_it_is_greedy_and_which_rows_sample(is_greedy: bool) -> None:
    scheduler = make()
    add(scheduler, make_request("a", 3), make_request("b", 50))
    step = schedule(scheduler)
    device = Device()
    shape = device.buckets.choose(step.num_scheduled_tokens, len(step.rows))
    packed, _ = device.builder.build(step, shape, is_greedy=is_greedy)
    parts = split_packed(shape, jnp.array(packed))
    assert parts["is_greedy"].tolist() == [is_greedy]
    assert parts["samples_token"].tolist() == [1, 0, 0, 0]
    assert parts["slots"].tolist() == [0, 1, MAX_NUM_SEQS, MAX_NUM_SEQS]
