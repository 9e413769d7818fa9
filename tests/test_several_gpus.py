"""Tensor, pipeline and data parallelism on as many real GPUs as there are, against one of them."""

import math
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxengine import LLM
from tests.helpers import greedy, make_llm, random_prompts, save_tiny_chat_model

pytestmark = pytest.mark.gpu

# Sizes that the compiled kernels serve: heads of 64.
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
}
# The third one comes in chunks of 16. Many, as one token in seven is nearly a tie.
PROMPTS = random_prompts(14, 15, 40, *range(3, 16))
NUM_TOKENS = 24
# What rounding in another order makes of logprobs, on average and at most: on one CPU float16 is
# 0.026 and 0.24 away from float32. In bfloat16 this model is 0.21 and 2.1 away, as far as another
# token.
DTYPE, MEAN_ERROR, MOST_ERROR = "float16", 0.05, 0.4
# The first two prompts need 3 blocks each to their end, there are 4.
ENGINE = {"dtype": DTYPE, "max_num_seqs": 2, "num_gpu_blocks_override": 5}
SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
LAYOUTS = (
    *((2, 1, 1), (1, 2, 1), (1, 1, 2)),
    *((4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2)),
    *(
        (8, 1, 1),
        (4, 2, 1),
        (2, 2, 2),
        (1, 1, 8),
    ),  # in 8, each KV head is there twice
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("several_gpus"), **MODEL)


def generate(llm: LLM) -> list[list[dict[int, float]]]:
    """Generate twice, the second time with cached prefixes; the top logprobs of every token."""
    found = []
    for prompts in (PROMPTS, PROMPTS[2:]):
        outputs = llm.generate(prompts, greedy(NUM_TOKENS, logprobs=3), use_tqdm=False)
        for output in outputs:
            tokens = output.outputs[0].logprobs or []
            found.append([{t: each.logprob for t, each in token.items()} for token in tokens])
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[dict[int, float]]]:
    return generate(make_llm(model, **ENGINE))


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or len(jax.devices()) < 2, reason="needs two GPUs"
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}-pp{}-dp{}".format(*sizes))
def test_several_gpus_give_the_tokens_of_one(
    model: Path, expected: Any, layout: tuple[int, int, int]
) -> None:
    """Through chunked prefill, preemption and cached prefixes; until two tokens are a tie."""
    if math.prod(layout) > len(jax.devices()):
        pytest.skip(f"needs {math.prod(layout)} GPUs")
    parallel = dict(zip(SIZES, layout, strict=True))
    llm = make_llm(model, **ENGINE, **parallel)
    found_first = generate(llm)
    llm.reset_prefix_cache()
    assert generate(llm) == found_first, "GPUs read what the other one has not written yet"
    errors = []
    for ours, theirs in zip(found_first, expected, strict=True):
        for found, wanted in zip(ours, theirs, strict=True):
            best, other = max(wanted, key=wanted.__getitem__), max(found, key=found.__getitem__)
            errors.append(abs(found[best] - wanted[best]))
            if best != other:
                errors.append(wanted[best] - wanted[other])
                break  # a tie: from here on the sequences differ
    assert len(errors) > NUM_TOKENS
    assert max(errors) < MOST_ERROR
    assert sum(errors) / len(errors) < MEAN_ERROR
