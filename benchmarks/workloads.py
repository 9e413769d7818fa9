"""Fixed workloads: lists of (prompt tokens, output tokens), one pair a request.

All requests are there at the start, greedy, end-of-sequence ignored. ``chat`` draws lengths from
log-normal laws whose means are those of ShareGPT in the PagedAttention paper (arXiv:2309.06180):
161 prompt and 338 output tokens.
"""

import numpy as np

from jaxengine.bench.workload import random_prompts

Workload = list[tuple[int, int]]

CHAT_SEED = 20261122
CHAT_REQUESTS = 1000
MAX_PROMPT_TOKEN = 30000


def _log_normal(rng: np.random.Generator, mean: float, sigma: float) -> np.ndarray:
    mu = np.log(mean) - sigma**2 / 2
    lengths = np.rint(rng.lognormal(mu, sigma, CHAT_REQUESTS))
    return np.clip(lengths, 4, 1024).astype(int)


def _chat() -> Workload:
    rng = np.random.default_rng(CHAT_SEED)
    prompts, outputs = _log_normal(rng, 161, 1.2), _log_normal(rng, 338, 0.9)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


WORKLOADS: dict[str, Workload] = {
    "single": [(128, 256)],
    "batch-8": [(128, 256)] * 8,
    "decode-heavy": [(128, 512)] * 256,
    "chat": _chat(),
    "prefill-heavy": [(2048, 16)] * 128,
    "long-context": [(8192, 128)] * 32,
    # Not in the comparison, and tuned for by nobody: they keep the others honest.
    "odd-lengths": [(37 + 61 * i % 1500, 19 + 29 * i % 400) for i in range(333)],
    "smoke": [(5 + 7 * i % 40, 3 + i % 9) for i in range(24)],
}


def prompts_of(workload: Workload, vocab_size: int) -> list[list[int]]:
    """Random prompt ids, drawn in request order."""
    return random_prompts([n for n, _ in workload], min(MAX_PROMPT_TOKEN, vocab_size))
