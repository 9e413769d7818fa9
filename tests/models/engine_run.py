"""Runs models on virtual CPU devices, whole and in parts, and prints their tokens as JSON.

A program of its own, because the number of devices is fixed when jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.engine_run DIRECTORY ...
"""

import json
import sys
from typing import Any

from jaxengine.outputs import RequestOutput
from tests.helpers import assert_idle, greedy, make_llm, output_ids, random_prompts

PROMPTS = random_prompts(14, 15, 40)  # the last one comes in chunks of 16
NUM_TOKENS = 20
MESHES = {"one device": (1, 1), "two shards of two stages": (2, 2)}
# The first two need 3 blocks each to their end, there are 4.
LIMITS = {"max_num_seqs": 2, "num_gpu_blocks_override": 5}


def logprobs_of(output: RequestOutput) -> list[float]:
    """Of each token that was sampled."""
    (completion,) = output.outputs
    chosen = zip(completion.token_ids, completion.logprobs or [], strict=True)
    return [found[token].logprob for token, found in chosen]


def run(directory: str) -> dict[str, Any]:
    """By mesh: each prompt's tokens, their logprobs, and how often a request was preempted."""
    results = {}
    for name, (tensor_size, pipeline_size) in MESHES.items():
        llm = make_llm(
            directory,
            tensor_parallel_size=tensor_size,
            pipeline_parallel_size=pipeline_size,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=64,
            **LIMITS,
        )
        outputs = llm.generate(PROMPTS, greedy(NUM_TOKENS, logprobs=0), use_tqdm=False)
        assert_idle(llm)
        results[name] = {
            "tokens": output_ids(outputs),
            "logprobs": [logprobs_of(output) for output in outputs],
            "num_preemptions": llm.stats().num_preemptions,
        }
    return results


if __name__ == "__main__":
    print(json.dumps({directory: run(directory) for directory in sys.argv[1:]}))
