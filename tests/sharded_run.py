"""Runs a model in many shapes on 8 virtual CPU devices and prints what happened, as JSON.

A program of its own, because the number of devices is fixed when jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.sharded_run MODEL
"""

import json
import re
import sys
from typing import Any

import jax

from jaxengine import LLM, SamplingParams
from jaxengine.engine import build
from tests.helpers import assert_idle, greedy, make_llm, output_ids, random_prompts

SIZES = (1, 2, 4, 8)
PIPELINES = ((1, 2), (1, 4), (2, 2), (4, 2))  # tensor- and pipeline-parallel size
MESHES = (*((size, 1) for size in SIZES), *PIPELINES)
REPLICAS = "tp2 pp2 dp2"
PROMPTS = random_prompts(14, 15, 40)  # the last one comes in chunks of 16
NUM_TOKENS = 24


def name_of(mesh: tuple[int, int]) -> str:
    """Such as "tp2 pp1"."""
    return f"tp{mesh[0]} pp{mesh[1]}"


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
    """Generate twice, the second time with cached prefixes."""
    first = llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)
    second = llm.generate(PROMPTS[2:], greedy(NUM_TOKENS), use_tqdm=False)
    return {
        "first": output_ids(first),
        "second": output_ids(second),
        "num_preemptions": llm.stats().num_preemptions,
        "num_cached_tokens": second[0].num_cached_tokens,
    }


def run_mixed(llm: LLM) -> list[Any]:
    """Many requests of all kinds at once, more than there is room for: ids and logprobs."""
    prompts = random_prompts(3, 30, 9, 17, 1, 22, 5, 12, 40, 8, 2, 19)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 5, "temperature": 1.2, "top_k": 20},
        {"temperature": 0, "repetition_penalty": 1.4, "logprobs": 3},
        {"seed": 6, "n": 2, "top_p": 0.9, "prompt_logprobs": 2},
    ]
    params = [
        SamplingParams(max_tokens=5 + 3 * i, ignore_eos=True, **kinds[i % 4])
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [
        {
            "token_ids": [list(each.token_ids) for each in output.outputs],
            "logprobs": [_values(each.logprobs) for each in output.outputs],
            "prompt_logprobs": _values(output.prompt_logprobs),
        }
        for output in outputs
    ]


def _values(logprobs: Any) -> list[list[float]]:
    """The numbers alone, by position and token id."""
    positions = [position or {} for position in logprobs or []]
    return [[each[token].logprob for token in sorted(each)] for each in positions]


def look_inside(llm: LLM) -> dict[str, Any]:
    """What the compiled programs communicate, and what each device holds."""
    assert_idle(llm)
    runner = llm.engine.runner
    shapes = runner._buckets.all_shapes()[:2]
    return {
        "collectives": {
            "decode" if shape.decode_only else "mixed": [
                collectives(stage.program(shape)) for stage in runner.stages
            ]
            for shape in shapes
        },
        "param_bytes": bytes_by_device([stage.params for stage in runner.stages]),
        "cache_bytes": bytes_by_device([stage.state.caches for stage in runner.stages]),
    }


def make_mesh_llm(model: str, mesh: tuple[int, int], **limits: int) -> LLM:
    """An engine whose steps overwrite outputs, as on GPUs; a single device does without."""
    build.overwrites_outputs = lambda parts: parts.is_last and mesh != (1, 1)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    return make_llm(model, **sizes, **limits)


def main() -> None:
    """Print one JSON object: name of the mesh -> result."""
    assert len(jax.devices()) == 8
    results = {}
    # The first two need 3 blocks each to their end, there are 4.
    limits = {"max_num_seqs": 2, "num_gpu_blocks_override": 5}
    for mesh in MESHES:
        llm = make_mesh_llm(sys.argv[1], mesh, **limits)
        results[name_of(mesh)] = run(llm) | look_inside(llm)
    for mesh in ((1, 1), (1, 2), (2, 2)):
        llm = make_mesh_llm(sys.argv[1], mesh, max_num_seqs=6, num_gpu_blocks_override=15)
        results[name_of(mesh)]["mixed"] = run_mixed(llm)
    limits["data_parallel_size"] = 2
    results[REPLICAS] = run(make_mesh_llm(sys.argv[1], (2, 2), **limits))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
