"""The account of device memory, and what is said when it does not add up."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxengine.engine.device import memory
from jaxengine.engine.device.memory import GIB, SLACK_BYTES, MemoryBudget, num_blocks_that_fit

MIB = 1 << 20


def test_the_cache_gets_what_the_rest_leaves() -> None:
    num_blocks = num_blocks_that_fit(
        limit_bytes=10 * GIB,
        weight_bytes=6 * GIB,
        step_bytes=GIB,
        state_bytes=GIB - SLACK_BYTES,
        block_bytes=3 * MIB,
    )
    assert num_blocks == 2 * GIB // (3 * MIB)


def test_too_little_memory_is_an_error_with_every_number_and_every_flag() -> None:
    with pytest.raises(ValueError, match="not enough device memory") as error:
        num_blocks_that_fit(
            limit_bytes=16 * GIB,
            weight_bytes=15 * GIB,
            step_bytes=int(1.5 * GIB),
            state_bytes=GIB // 4,
            block_bytes=2 * MIB,
        )
    message = str(error.value)
    for number in ("weights 15.00", "step 1.50", "logits 0.25", "leave -1.00", "of 16.00 GiB"):
        assert number in message
    for flag in (
        "--gpu-memory-utilization",
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "--tensor-parallel-size",
    ):
        assert flag in message


def test_a_single_block_is_not_enough_as_block_0_is_reserved() -> None:
    sizes = {"weight_bytes": 0, "step_bytes": 0, "state_bytes": 0, "block_bytes": MIB}
    with pytest.raises(ValueError, match="not enough"):
        num_blocks_that_fit(limit_bytes=SLACK_BYTES + 2 * MIB - 1, **sizes)
    assert num_blocks_that_fit(limit_bytes=SLACK_BYTES + 2 * MIB, **sizes) == 2


def test_a_cache_of_a_chosen_size_that_does_not_fit_is_an_error() -> None:
    memory.check_fits(4 * GIB, GIB, 3 * GIB)
    with pytest.raises(ValueError, match=r"1\.00 GiB and a KV cache of 4\.00 GiB.*4\.00 GiB"):
        memory.check_fits(4 * GIB, GIB, 4 * GIB)


def test_the_table_adds_up_to_what_may_be_used() -> None:
    budget = MemoryBudget(
        total_bytes=80 * GIB,
        limit_bytes=70 * GIB,
        weight_bytes=16 * GIB,
        step_bytes=2 * GIB,
        state_bytes=GIB,
        block_bytes=2 * MIB,
        num_blocks=25 * 1024,
        block_size=16,
    )
    lines = budget.table().splitlines()
    sizes = [float(line.split(" GiB")[0].split()[-1]) for line in lines]
    assert sizes == [80, 70, 16, 2, 1, 50, 1]
    assert "25600 blocks of 16 tokens: 409,600 tokens" in lines[5]


def fake_gpu(**stats: int) -> Any:
    return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


def test_the_limit_is_the_share_asked_for_less_what_others_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    device = fake_gpu(bytes_limit=40 * GIB, bytes_in_use=3 * GIB)
    total, limit = memory.device_limit(device, 0.25 + memory.DRIVER_FRACTION)
    assert total == 80 * GIB
    assert abs(limit - 17 * GIB) <= 1


def test_a_pool_made_smaller_than_the_share_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    _, limit = memory.device_limit(fake_gpu(bytes_limit=40 * GIB), 0.9)
    assert limit == 40 * GIB
