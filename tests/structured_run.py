"""Structured outputs in several shapes on 8 virtual CPU devices; prints what came, as JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.structured_run MODEL
"""

import json
import sys
from typing import Any

from jaxengine import LLM, SamplingParams
from tests.helpers import assert_idle, greedy, make_llm, random_prompts

SHAPES: dict[str, dict[str, int]] = {
    "one": {},
    "tp2 pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
}


def params() -> list[SamplingParams]:
    """Two of each: greedy and random, structured and free."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "structured_outputs": {"regex": "([a-f]{2}-){9}"}},
        {"temperature": 1.0, "seed": 3, "structured_outputs": {"regex": "([a-z]{3} )+"}},
        {"temperature": 1.0, "seed": 4, "ignore_eos": True},
    ]
    return [*(SamplingParams(max_tokens=24, **kind) for kind in kinds * 2), greedy(24)]


def run(llm: LLM) -> list[Any]:
    """Generate for all at once, more than there is room for."""
    outputs = llm.generate(random_prompts(3, 30, 9, 17, 1, 22, 5), params(), use_tqdm=False)
    if hasattr(llm.engine, "runner"):
        assert_idle(llm)
    return [[list(o.outputs[0].token_ids), o.outputs[0].text] for o in outputs]


if __name__ == "__main__":
    model = sys.argv[1]
    print(json.dumps({name: run(make_llm(model, **shape)) for name, shape in SHAPES.items()}))
