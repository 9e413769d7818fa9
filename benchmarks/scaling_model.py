"""How long a step takes on tensor x pipeline x data parallel GPUs, added up from measured pieces.

A step of one stage is layers, one after the other, plus embedding (first stage) and logits (last):

    layer = products + attention + activations + launches + 2 all-reduces
    products = hypot(weight bytes / bandwidth, operations / rate): the two overlap, but not fully
    attention of decoding = a constant + KV bytes / bandwidth; of prefill = operations / rate

Tensor parallelism divides products, attention and half of the activations, and adds the
all-reduces. Pipeline parallelism divides the layers: a replica's rows go round in as many groups as
there are stages, each group passes every stage for a token. Data parallelism divides the requests.
"""

import dataclasses
import math
from collections.abc import Sequence

from benchmarks.scaling_pieces import DEVICE_BYTES, Pieces, Wires
from benchmarks.workloads import Workload
from jaxengine.model_config import ModelConfig

ACTIVATION_BYTES = 2  # bfloat16; the KV cache too
GPU_MEMORY_UTILIZATION = 0.9
STEP_BYTES = 4e9  # the largest step's temporaries, logits and tables; an assumption
MAX_STEP_TOKENS = 16384  # the engine's max_num_batched_tokens on Hopper
GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many GPUs share a layer, how many groups of them share the layers, how many replicas."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def num_devices(self) -> int:
        """GPUs of all replicas."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        named = (("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data))
        return " x ".join(f"{name}{size}" for name, size in named if size > 1) or "1"


class CostModel:
    """Predicts steps of a model on a layout.

    Args:
        weight_bits: Bits a weight of the layers has in memory; products run in bfloat16 anyway.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        pieces: Pieces,
        wires: Wires,
        weight_bits: int = 16,
    ) -> None:
        self._model, self._layout, self._pieces, self._wires = model, layout, pieces, wires
        self._weight_bits = weight_bits
        tensor = layout.tensor
        # Fewer KV heads than GPUs: heads are repeated, so that each GPU has one.
        self._kv_heads = max(model.num_kv_heads, tensor) // tensor
        self._heads = model.num_heads // tensor
        qkv = model.hidden_size * (self._heads + 2 * self._kv_heads) * model.head_dim
        out = model.hidden_size * self._heads * model.head_dim
        mlp = 3 * model.hidden_size * model.intermediate_size // tensor
        self._layer_params = qkv + out + mlp
        self._vocab_params = model.vocab_size * model.hidden_size // tensor

    def weight_bytes(self) -> float:
        """Bytes of the weights on the fullest device."""
        return max(self._stage_weight_bytes(stage) for stage in range(self._layout.pipeline))

    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache of all replicas; 0 if the weights alone do not fit."""
        token_bytes = 2 * self._kv_heads * self._model.head_dim * ACTIVATION_BYTES
        room = GPU_MEMORY_UTILIZATION * DEVICE_BYTES - STEP_BYTES - self.weight_bytes()
        return max(0, int(room / (token_bytes * self._layers_of(0)))) * self._layout.data

    def decode_s(self, rows: int, context: float) -> float:
        """Seconds until each of a replica's ``rows`` has one more token."""
        stages = self._layout.pipeline
        groups = min(stages, rows)
        group_rows = math.ceil(rows / groups)
        attention_s = self._decode_attention_s(group_rows, context)
        times = self._stage_times(group_rows, attention_s, group_rows)
        round_s = sum(times)
        if stages > 1:
            round_s += self._send_s(4 * group_rows)  # the tokens, back to the first stage
        return max(groups * max(times), round_s) + self._pieces.step_s

    def decode_tok_s(self, rows: int, context: float) -> float:
        """Tokens a second over all replicas, which share ``rows`` evenly."""
        replicas = min(self._layout.data, rows)
        return rows / self.decode_s(math.ceil(rows / replicas), context)

    def prefill_s(self, prompt_lens: Sequence[int]) -> float:
        """Seconds until a replica has the first token of all prompts."""
        steps = [self._prefill_times(chunk) for chunk in _chunks(prompt_lens)]
        # The first step passes all stages; each further one waits for the slowest stage only.
        return sum(steps[0]) + sum(max(times) for times in steps[1:])

    def prefill_tok_s(self, num_prompts: int, prompt_len: int) -> float:
        """Prompt tokens a second over all replicas."""
        each = math.ceil(num_prompts / self._layout.data)
        return num_prompts * prompt_len / self.prefill_s([prompt_len] * each)

    def workload_s(self, workload: Workload) -> float:
        """Seconds of a whole ``generate`` call: all prompts first, then steps of those that run."""
        share = workload[:: self._layout.data]
        seconds = self.prefill_s([prompt for prompt, _ in share])
        for step in range(1, max(output for _, output in share)):
            contexts = [prompt + step for prompt, output in share if output > step]
            seconds += self.decode_s(len(contexts), sum(contexts) / len(contexts))
        return seconds

    def _layers_of(self, stage: int) -> int:
        fewest, more = divmod(self._model.num_layers, self._layout.pipeline)
        return fewest + (stage < more)

    def _stage_weight_bytes(self, stage: int) -> float:
        params = self._layers_of(stage) * self._layer_params * self._weight_bits / 8
        last = self._layout.pipeline - 1
        num_vocab = (stage == 0) + (stage == last)
        if self._model.spec.head.is_tied and last == 0:
            num_vocab = 1
        return params + num_vocab * self._vocab_params * ACTIVATION_BYTES

    def _prefill_times(self, prompt_lens: Sequence[int]) -> list[float]:
        keys = sum(length * (length + 1) / 2 for length in prompt_lens)
        operations = 4 * keys * self._heads * self._model.head_dim
        attention_s = self._pieces.attention_s + operations / self._pieces.prefill_attention_flop_s
        return self._stage_times(sum(prompt_lens), attention_s, len(prompt_lens))

    def _decode_attention_s(self, rows: int, context: float) -> float:
        num_bytes = 2 * rows * context * self._kv_heads * self._model.head_dim * ACTIVATION_BYTES
        return self._pieces.attention_s + num_bytes / self._pieces.read_bytes_s

    def _stage_times(self, tokens: int, attention_s: float, sampled: int) -> list[float]:
        """Seconds of each stage, handing its result over included."""
        model, last = self._model, self._layout.pipeline - 1
        hidden_bytes = tokens * model.hidden_size * ACTIVATION_BYTES
        layer_s = (
            self._products_s(self._layer_params, tokens, self._weight_bits)
            + attention_s
            + self._activations_s(tokens)
            + self._pieces.layer_s
            + 2 * self._all_reduce_s(hidden_bytes)
        )
        times = [self._layers_of(stage) * layer_s for stage in range(last + 1)]
        times[0] += self._all_reduce_s(hidden_bytes)  # the embedding
        times[last] += self._products_s(self._vocab_params, sampled, 16)
        times[last] += self._gather_s(sampled * model.vocab_size * ACTIVATION_BYTES)
        return [
            seconds + (self._send_s(hidden_bytes) if stage < last else 0.0)
            for stage, seconds in enumerate(times)
        ]

    def _products_s(self, params: int, tokens: int, weight_bits: int) -> float:
        bytes_s = params * weight_bits / 8 / self._pieces.read_bytes_s
        return math.hypot(bytes_s, 2 * params * tokens / self._pieces.product_flop_s)

    def _activations_s(self, tokens: int) -> float:
        """Norms and residuals, which every GPU does whole, and the rest, which is divided."""
        whole = 9 * self._model.hidden_size
        divided = 3 * self._heads * self._model.head_dim
        divided += 5 * self._model.intermediate_size // self._layout.tensor
        num_bytes = tokens * (whole + divided) * ACTIVATION_BYTES
        return num_bytes / self._pieces.read_bytes_s

    def _all_reduce_s(self, num_bytes: float) -> float:
        size = self._layout.tensor
        if size == 1:
            return 0.0
        wires, local = self._wires, min(size, GPUS_PER_HOST)
        seconds = wires.latency_s + wires.latency_per_gpu_s * local
        seconds += 2 * (local - 1) / local * num_bytes / wires.nvlink_bytes_s
        if (hosts := size // GPUS_PER_HOST - 1) > 0:
            # Each GPU sums its share with its peers on the other hosts.
            seconds += wires.network_latency_s * math.ceil(math.log2(hosts + 1))
            seconds += 2 * hosts / (hosts + 1) * num_bytes / local / wires.network_bytes_s
        return seconds

    def _gather_s(self, num_bytes: float) -> float:
        """Logits of a vocabulary that is cut; every GPU gets them all, and reads them once."""
        half = self._all_reduce_s(num_bytes) / 2  # an all-reduce is a reduce-scatter and this
        return half + num_bytes / self._pieces.read_bytes_s

    def _send_s(self, num_bytes: float) -> float:
        """Every GPU of a stage hands its copy to its counterpart of the next.

        Where a replica spans hosts, every hand-over counts as one between hosts.
        """
        wires = self._wires
        if self._layout.tensor * self._layout.pipeline <= GPUS_PER_HOST:
            return wires.send_latency_s + num_bytes / wires.nvlink_bytes_s
        latency_s = wires.send_latency_s + wires.network_latency_s
        return latency_s + num_bytes / wires.network_bytes_s


def _chunks(prompt_lens: Sequence[int]) -> list[list[int]]:
    """Prompts of each step: whole ones, as many as its tokens allow, at least one."""
    chunks: list[list[int]] = [[]]
    for length in prompt_lens:
        if chunks[-1] and sum(chunks[-1]) + length > MAX_STEP_TOKENS:
            chunks.append([])
        chunks[-1].append(length)
    return chunks
