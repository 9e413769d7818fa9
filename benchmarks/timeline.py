"""Where the GPU's time goes in a run: idle share between kernels, and the kernels by time.

    python -m benchmarks.timeline --model benchmarks/models/llama-3.1-8b --load-format dummy \
        --workload decode-heavy --max-output-tokens 40

Traces one ``LLM.generate`` call with jax.profiler and reads the trace back, the first GPU's part of
it if there are several. Prints a table and, last, one JSON line.
"""

import argparse
import collections
import json
import re
import tempfile
from pathlib import Path

import jax

from benchmarks.host_steps import generate
from benchmarks.workloads import WORKLOADS
from jaxengine import LLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=["smoke"])
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--max-output-tokens", type=int, default=40)
    parser.add_argument("--max-requests", type=int, default=10**9)
    parser.add_argument("--top", type=int, default=25)
    args = parser.parse_args()
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    for name in args.workload:
        workload = [
            (n_in, min(n_out, args.max_output_tokens))
            for n_in, n_out in WORKLOADS[name][: args.max_requests]
        ]
        generate(llm, workload)
        generate(llm, workload)
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                generate(llm, workload)
            report(name, Path(directory), args.top)


def report(name: str, directory: Path, top: int) -> None:
    """Print the busy and idle time of a GPU's streams and the kernels that took longest."""
    (file,) = directory.rglob("*.xplane.pb")
    events = list(_gpu_events(file))
    if not events:
        print(f"{name}: the trace holds no GPU events")
        return
    first, last = min(e[0] for e in events), max(e[0] + e[1] for e in events)
    busy = _union_ns((start, start + duration) for start, duration, _ in events)
    by_kernel: dict[str, list[float]] = collections.defaultdict(list)
    for _, duration, kernel in events:
        by_kernel[kernel].append(duration)
    idle = 1 - busy / (last - first)
    print(f"{name}: {(last - first) / 1e6:.1f} ms on the GPU, idle {idle:.1%}")
    ranked = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:top]
    for kernel, durations in ranked:
        print(
            f"  {sum(durations) / 1e6:9.2f} ms {sum(durations) / busy:6.1%} {len(durations):6} x "
            f"{sum(durations) / len(durations) / 1e3:8.1f} us  {kernel}"
        )
    record = {"workload": name, "gpu_ms": round((last - first) / 1e6, 2), "idle": round(idle, 4)}
    print(json.dumps(record), flush=True)


def _gpu_events(file: Path):
    data = jax.profiler.ProfileData.from_file(str(file))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in sorted(planes, key=lambda plane: plane.name)[:1]:
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                yield event.start_ns, event.duration_ns, re.sub(r"[._]\d+$", "", event.name)


def _union_ns(spans) -> float:
    total, end = 0.0, 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


if __name__ == "__main__":
    main()
