"""Runs a model as 1, 2 and 4 replicas on virtual CPU devices and prints what happened, as JSON.

A program of its own, because the number of devices is fixed when jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.replicas_run MODEL
"""

import json
import sys
from typing import Any

import jax

from jaxengine import LLM, SamplingParams
from jaxengine.engine.replicas import ReplicaGroup
from tests.helpers import greedy, make_llm, output_ids, random_prompts
from tests.sharded_run import bytes_by_device

LAYOUTS = (
    "1 x 1 x 1",
    "1 x 1 x 2",
    "1 x 1 x 4",
    "2 x 1 x 2",
    "1 x 2 x 2",
)  # tensor x pipeline x data
PROMPTS = random_prompts(14, 15, 40, 3, 22, 9, 31, 5)
RANDOM = [  # with a seed and without
    SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
    for seed in [None, 7] * (len(PROMPTS) // 2)
]
ENGINE = {"seed": 11, "max_num_seqs": 2, "num_gpu_blocks_override": 9}


def run(llm: LLM) -> dict[str, Any]:
    """Generate greedily and at random, and look which devices did it."""
    engine = llm.engine
    replicas = engine.replicas if isinstance(engine, ReplicaGroup) else (engine,)
    params = [stage.params for replica in replicas for stage in replica.runner.stages]
    return {
        "greedy": output_ids(llm.generate(PROMPTS, greedy(16), use_tqdm=False)),
        "random": output_ids(llm.generate(PROMPTS, RANDOM, use_tqdm=False)),
        "prompt_tokens": [replica.stats().prefix_cache_queries for replica in replicas],
        "num_devices": sum(map(bool, bytes_by_device(params))),
    }


def main() -> None:
    """Print one JSON object: layout -> result."""
    assert len(jax.devices()) == 8
    results = {}
    for layout in LAYOUTS:
        names = ("tensor", "pipeline", "data")
        sizes = zip(names, map(int, layout.split(" x ")), strict=True)
        layout_args = {f"{name}_parallel_size": size for name, size in sizes}
        results[layout] = run(make_llm(sys.argv[1], **layout_args, **ENGINE))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
