"""Decides the number of KV blocks: by guess, then by what the compiled steps need."""

import dataclasses
from collections.abc import Callable

from jaxengine.config import EngineConfig
from jaxengine.engine.device import memory
from jaxengine.engine.device.model_runner import ModelRunner
from jaxengine.engine.device.stage import Stage
from jaxengine.engine.limits import Limits


def plan_memory(
    runner: ModelRunner,
    config: EngineConfig,
    limits: Limits,
    agree_on_blocks: Callable[[int], int],
) -> memory.MemoryBudget:
    """Decide the number of KV blocks, the same in every stage, and account for the rest.

    What is compiled to measure must be the same in all processes, too: XLA may share its trials
    of kernels among them. So they agree on the guess.

    Returns:
        The account of the stage that has room for the fewest blocks.
    """
    blocks_per_seq = -(-limits.max_model_len // config.block_size)
    most_useful = limits.max_num_seqs * blocks_per_seq + 1
    budgets = [
        _plan_stage(stage, runner, config, blocks_per_seq, most_useful) for stage in runner.stages
    ]
    is_measured = not (_cache_size_is_given(config) or runner.stages[0].parts.is_on_cpu)
    if is_measured:
        guess = min(budget.num_blocks for budget in budgets)
        runner.set_num_blocks(agree_on_blocks(guess))
        if limits.compiles_at_start:  # the largest programs beside all others, not before them
            runner.compile_all(show_progress=not config.disable_log_stats)
        budgets = [
            _measure_stage(stage, runner, budget, most_useful)
            for stage, budget in zip(runner.stages, budgets, strict=True)
        ]
    return min(budgets, key=lambda budget: budget.num_blocks)


def _cache_size_is_given(config: EngineConfig) -> bool:
    return bool(config.num_gpu_blocks_override or config.kv_cache_memory_bytes)


def _plan_stage(
    stage: Stage, runner: ModelRunner, config: EngineConfig, blocks_per_seq: int, most_useful: int
) -> memory.MemoryBudget:
    """Return a stage's account, its largest step guessed unless the cache's size is given."""
    total, limit = memory.device_limit(stage.parts.local_device, config.gpu_memory_utilization)
    state_bytes, block_bytes = runner.state_bytes(stage), stage.block_bytes
    step_bytes = 0  # on a CPU, programs are compiled later, and their temporaries are small
    if _cache_size_is_given(config) or stage.parts.is_on_cpu:
        bytes_wanted = config.kv_cache_memory_bytes
        if bytes_wanted is None:
            sequence_bytes = (blocks_per_seq + 1) * block_bytes
            bytes_wanted = memory.default_cpu_cache_bytes(limit, sequence_bytes)
        elif bytes_wanted < 2 * block_bytes:
            raise ValueError(
                f"kv_cache_memory_bytes {bytes_wanted} is less than two KV blocks of "
                f"{config.block_size} tokens, {2 * block_bytes} bytes on each device: raise it"
            )
        num_blocks = config.num_gpu_blocks_override or min(bytes_wanted // block_bytes, most_useful)
        memory.check_fits(limit, stage.weight_bytes + state_bytes, num_blocks * block_bytes)
    else:
        step_bytes = runner.guess_step_bytes(stage)
        num_blocks = memory.num_blocks_that_fit(
            limit_bytes=limit,
            weight_bytes=stage.weight_bytes,
            step_bytes=step_bytes,
            state_bytes=state_bytes,
            block_bytes=block_bytes,
        )
    return memory.MemoryBudget(
        total_bytes=total,
        limit_bytes=limit,
        weight_bytes=stage.weight_bytes,
        step_bytes=step_bytes,
        state_bytes=state_bytes,
        block_bytes=block_bytes,
        num_blocks=min(num_blocks, most_useful) if step_bytes else num_blocks,
        block_size=config.block_size,
    )


def _measure_stage(
    stage: Stage, runner: ModelRunner, guessed: memory.MemoryBudget, most_useful: int
) -> memory.MemoryBudget:
    """Return a stage's exact account.

    The cache's size is part of the compiled programs, and what they need decides it. So they have
    been compiled for a guess, which stays if it fits and wastes little.
    """
    step_bytes = runner.measure(stage)
    exact = memory.num_blocks_that_fit(
        limit_bytes=guessed.limit_bytes,
        weight_bytes=guessed.weight_bytes,
        step_bytes=step_bytes,
        state_bytes=guessed.state_bytes,
        block_bytes=guessed.block_bytes,
    )
    exact = min(exact, most_useful)
    keeps_guess = exact * 0.97 <= stage.num_blocks <= exact
    return dataclasses.replace(
        guessed, step_bytes=step_bytes, num_blocks=stage.num_blocks if keeps_guess else exact
    )
