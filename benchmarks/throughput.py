"""Whole ``LLM.generate`` calls on fixed workloads: seconds, tokens a second, KV waste.

    python -m benchmarks.throughput --model benchmarks/models/llama-3.1-8b --load-format dummy \
        --workload single decode-heavy --dtype bfloat16

Prints a table, and last one JSON line a workload; ``--output`` appends each to a file as soon as
it is there. With ``--host-steps`` the last run's parts of a step are in it (``host_steps.py``).
"""

import argparse
import contextlib
import functools
import time
from pathlib import Path

import jax

from benchmarks.host_steps import generate, summary, timed_steps
from benchmarks.records import Record, append, publish, run_record
from benchmarks.workloads import WORKLOADS
from jaxengine import LLM

WARM_UP_REQUESTS = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=["smoke"])
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--repeat-seconds", type=float, default=1e9, help="begin no repeat after so many seconds"
    )
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--attention-backend")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--host-steps", action="store_true", help="time the host's part of a step")
    parser.add_argument("--profile", type=Path, help="write a jax.profiler trace here")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        data_parallel_size=args.data_parallel_size,
        attention_backend=args.attention_backend,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    generate(llm, [(8, 1)])
    startup_s = time.perf_counter() - started
    startup = llm.startup
    print(
        f"start to first token {startup_s:.1f} s: load {startup.load_s:.1f} s, compile "
        f"{startup.compile_s:.1f} s for {len(startup.compile_seconds)} programs",
        flush=True,
    )
    print(f"{'workload':15}{'seconds':>9}{'out tok/s':>11}{'all tok/s':>11}{'KV waste':>10}  all")
    records = []
    for name in args.workload:
        record = measure(llm, name, args) | {"startup_s": round(startup_s, 2)}
        records.append(record)
        append([record], args.output)
        print(
            f"{name:15}{record['seconds']:9.3f}{record['output_tok_s']:11.0f}"
            f"{record['total_tok_s']:11.0f}{record['kv_waste']:10.1%}  {record['all']}",
            flush=True,
        )
    publish(records, None)


def measure(llm: LLM, name: str, args: argparse.Namespace) -> Record:
    """Time a workload; the first call is not counted."""
    workload = WORKLOADS[name]
    is_compiled = bool(llm.startup.compile_seconds)  # else the first call has to meet every shape
    warm_up = workload[:WARM_UP_REQUESTS] if is_compiled else workload
    generate(llm, [(n_in, min(n_out, 4)) for n_in, n_out in warm_up])
    if args.profile:
        with jax.profiler.trace(str(args.profile / name)):
            generate(llm, workload)
    watch = functools.partial(timed_steps, llm) if args.host_steps else contextlib.nullcontext
    seconds: list[float] = []
    while not seconds or (len(seconds) < args.repeats and sum(seconds) < args.repeat_seconds):
        with watch() as last_steps:
            seconds.append(generate(llm, workload))
    outputs = sum(n for _, n in workload)
    best = min(seconds)
    record = run_record(args.model, llm.engine.model_config.dtype, name) | {
        "seconds": round(best, 3),
        "all": [round(s, 3) for s in seconds],
        "output_tok_s": round(outputs / best, 1),
        "total_tok_s": round((outputs + sum(n for n, _ in workload)) / best, 1),
        "kv_waste": round(llm.stats().kv_waste_average, 4),
        "num_preemptions": llm.stats().num_preemptions,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "weight_bytes": llm.startup.budget.weight_bytes,
        "cache_bytes": llm.startup.budget.cache_bytes,
        "live_bytes": live_bytes_by_device(),
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "data_parallel_size": args.data_parallel_size,
    }
    return record | ({"host_steps": summary(last_steps)} if last_steps else {})


def live_bytes_by_device() -> list[int]:
    """Bytes of all arrays that live on each device that holds any, in the devices' order."""
    held: dict[jax.Device, int] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return [held[device] for device in sorted(held, key=lambda device: device.id)]


if __name__ == "__main__":
    main()
