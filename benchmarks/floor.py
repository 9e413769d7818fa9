"""The least time that a workload can take on a device, from its bytes and its arithmetic.

All prompts are computed at the rate of large products. Then each step gives every unfinished
request a token: it reads the weights and these requests' keys and values once, and multiplies; the
longer of the two counts. Nothing else costs anything: no launch, no activation, no padding.
"""

import dataclasses

import numpy as np

from benchmarks.workloads import Workload
from jaxengine.model_config import ModelConfig

ELEMENT_BYTES = 2  # of weights and of the KV cache


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device does in a second: bytes moved and operations of bf16 products."""

    bytes_s: float
    flop_s: float


# Measured: copies, read and write counted, and a product of 8192-cubed. By the device's name.
RATES = {"H100": Rates(2950e9, 805e12), "H200": Rates(4300e9, 790e12)}


def rates_of(device: str) -> Rates | None:
    """Return the rates of a device; None for one that is not in ``RATES``."""
    return next((rates for name, rates in RATES.items() if name in device), None)


def floor_s(workload: Workload, model: ModelConfig, rates: Rates) -> float:
    """Return the least seconds of a workload on one device."""
    queries = model.num_heads * model.head_dim
    keys_and_values = 2 * model.num_kv_heads * model.head_dim
    width = 2 * queries + keys_and_values + 3 * model.intermediate_size
    layers = model.num_layers * model.hidden_size * width  # weights of all products but the logits
    head = model.vocab_size * model.hidden_size
    prompts, outputs = np.array(workload, np.int64).T

    def attention_flops(keys: int) -> int:
        return 4 * model.num_layers * queries * keys

    prompt_keys = int((prompts * (prompts + 1)).sum()) // 2  # causal: token i sees i keys
    prefill_flops = 2 * (layers * prompts.sum() + head * len(prompts))
    seconds = float(prefill_flops + attention_flops(prompt_keys)) / rates.flop_s
    for step in range(1, int(outputs.max())):
        is_running = outputs > step
        keys = int((prompts[is_running] + step).sum())
        num_bytes = layers + head + model.num_layers * keys_and_values * keys
        flops = 2 * (layers + head) * int(is_running.sum()) + attention_flops(keys)
        seconds += max(ELEMENT_BYTES * num_bytes / rates.bytes_s, flops / rates.flop_s)
    return seconds
