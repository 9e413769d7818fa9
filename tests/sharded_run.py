"""Runs a model on 1, 2, 4 and 8 virtual CPU devices and prints what happened, as JSON.

A program of its own, because the number of devices is fixed when jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.sharded_run MODEL
"""

import json
import re
import sys
from typing import Any

import jax

from jaxengine import LLM
from tests.helpers import assert_idle, greedy, make_llm, output_ids, random_prompts

SIZES = (1, 2, 4, 8)
PROMPTS = random_prompts(14, 15, 40)  # the last one comes in chunks of 16
NUM_TOKENS = 24


def collectives(program: jax.stages.Compiled) -> list[str]:
    """Name and shape of every collective in a compiled program, such as "all-reduce 16,64"."""
    text = program.as_text() or ""
    pattern = r"= \(?\w+\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
    return sorted(f"{name} {shape}" for shape, name in re.findall(pattern, text))


def bytes_by_device(arrays: Any) -> list[int]:
    """Bytes that each device holds of some arrays."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def run(llm: LLM) -> dict[str, Any]:
    """Generate twice (the second time with cached prefixes), and look inside."""
    first = llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)
    second = llm.generate(PROMPTS[2:], greedy(NUM_TOKENS), use_tqdm=False)
    assert_idle(llm)
    runner, stats = llm.engine.runner, llm.get_metrics()
    return {
        "first": output_ids(first),
        "second": output_ids(second),
        "num_preemptions": stats.num_preemptions,
        "num_cached_tokens": second[0].num_cached_tokens,
        "collectives": {
            "decode" if shape.decode_only else "mixed": collectives(runner.program(shape))
            for shape in runner._buckets.all_shapes()[:2]
        },
        "param_bytes": bytes_by_device(runner._params),
        "cache_bytes": bytes_by_device(runner._caches),
    }


def main() -> None:
    """Print one JSON object: tensor-parallel size -> result."""
    assert len(jax.devices()) == 8
    results = {}
    for size in SIZES:
        # The first two need 3 blocks each to their end, there are 4.
        limits = {"max_num_seqs": 2, "num_gpu_blocks_override": 5}
        results[size] = run(make_llm(sys.argv[1], tensor_parallel_size=size, **limits))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
