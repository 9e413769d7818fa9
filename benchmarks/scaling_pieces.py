"""What a prediction of scaling is made of: speeds of one GPU and of the wires, with sources.

Measured here on one H200: memory bandwidth and attention (``results/h200-kernels.jsonl``, fitted),
arithmetic (``LOG.md``), and what a layer costs beside its products (from the ``single`` workload of
``results/h200.jsonl``). Not measured here: everything between GPUs. Those numbers are assumptions
with a public source, in three versions from hopeful to careful.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.records import ROOT, Record

US, GB = 1e-6, 1e9

# bf16 products of prefill-heavy. Source: LOG.md, "Where the time goes".
PRODUCT_FLOP_S = 710e12
# Ragged prefill, 8 x 2048, block 16, as shipped. Source: LOG.md, "Attention kernels".
PREFILL_ATTENTION_FLOP_S = 442e12
# The memory of an H200, as the driver reports it. Source: LOG.md, "Peak memory".
DEVICE_BYTES = 150.1e9


@dataclasses.dataclass(frozen=True)
class Wires:
    """What moving bytes between GPUs costs.

    An all-reduce over n GPUs of a host takes ``latency_s + latency_per_gpu_s * n`` and
    ``2 (n - 1) / n`` times its bytes at ``nvlink_bytes_s``.

    Attributes:
        nvlink_bytes_s: Per GPU and direction, what a collective reaches of it.
        network_bytes_s: The same between hosts.
        network_latency_s: What a collective or a transfer takes longer because it leaves the host.
        send_latency_s: Of handing activations to the next stage, within a host.
    """

    name: str
    latency_s: float
    latency_per_gpu_s: float
    nvlink_bytes_s: float
    network_bytes_s: float
    network_latency_s: float
    send_latency_s: float


# hopeful: one kernel that reads its peers. vLLM's takes 10 us for 0.5 MB on 2 and on 4 H100, 13 us
#   on 6 (github.com/vllm-project/vllm/pull/22086, /24532, /24111). NVLink SHARP: 480 GB/s on 8
#   (github.com/NVIDIA/nccl/issues/1455).
#   The 5 us on 2 GPUs agree with vLLM's ``single`` on two H200, which they were chosen to do.
# careful: NCCL as a launch of its own: 20.7 us for 16 KB, 24.8 us for 256 KB, 136 us for 16 MB on
#   8 H100 (github.com/ByteDance-Seed/Triton-distributed/issues/57).
# likely: XLA's own small all-reduce on its second stream, judged to lie between the two; 370 GB/s
#   is what NCCL's maintainers name for NVLink 4 (github.com/NVIDIA/nccl/issues/1442).
# Network: 400 Gb/s InfiniBand gives 46 to 48 GB/s a GPU (github.com/NVIDIA/nccl-tests/issues/290);
#   two hosts need 19 us for the smallest all-reduce (A100, /issues/150), NCCL often several times
#   that (arXiv:2511.09557).
WIRES = {
    wires.name: wires
    for wires in (
        Wires("hopeful", 4 * US, 0.5 * US, 480 * GB, 48 * GB, 10 * US, 5 * US),
        Wires("likely", 9 * US, 0.6 * US, 370 * GB, 46 * GB, 20 * US, 15 * US),
        Wires("careful", 13 * US, 0.9 * US, 250 * GB, 40 * GB, 60 * US, 40 * US),
    )
}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Speeds of one GPU.

    Attributes:
        read_bytes_s: Memory bandwidth of reading weights and KV blocks.
        attention_s: What decode attention of one layer takes besides reading.
        layer_s: Launches and small kernels of one layer.
        step_s: What the host adds to a step; 0 where it works ahead.
    """

    read_bytes_s: float
    attention_s: float
    layer_s: float = 0.0
    step_s: float = 0.0
    product_flop_s: float = PRODUCT_FLOP_S
    prefill_attention_flop_s: float = PREFILL_ATTENTION_FLOP_S


def read_records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fit_decode_attention(records: Iterable[Record]) -> Pieces:
    """Fit ``seconds = attention_s + bytes / read_bytes_s`` to the decode kernel, by relative error.

    Only cases of the model's own shape count: "decode 64x2048", nothing after it.
    """
    times = [
        (record["us"] * US, record["us"] * US * record["gb_s"] * GB)
        for record in records
        if record.get("implementation") == "triton"
        and re.fullmatch(r"decode \d+x\d+", record["case"])
    ]
    seconds, num_bytes = np.asarray(times).T
    columns = np.stack([1 / seconds, num_bytes / seconds], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)
    return Pieces(read_bytes_s=1 / float(per_byte), attention_s=float(latency))


def h200_pieces() -> Pieces:
    """Return the speeds of the H200, but for ``layer_s`` and ``step_s``."""
    return fit_decode_attention(read_records(ROOT / "benchmarks/results/h200-kernels.jsonl"))
