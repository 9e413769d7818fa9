"""Seconds from the start of a process to the first token: compilation cache empty, and full.

    python -m benchmarks.startup --model benchmarks/models/llama-3.1-8b --load-format dummy

Each start is a process of its own. The cold ones begin with an empty cache directory, the warm ones
find what the last cold one left. The parts follow each other:

    python     the interpreter, until the first line of this file
    imports    jaxengine and jax
    plan       config, tokenizer, the devices, the account of the memory
    compile    the step programs, as far as the engine compiles them at start
    weights    loading, and the samplers
    tokens     the first request; where nothing was compiled at start, its compilation too

"programs" counts everything that XLA was asked for in that time, and how many came from the cache.
Several compile at a time, so their seconds add up to more than they take. Prints a table, the
slowest programs, and last one JSON line.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED_VARIABLE = "JAXENGINE_BENCHMARK_STARTED"  # time.time() when the parent started the child
PARTS = ("python", "imports", "plan", "compile", "weights", "tokens")

Record = dict[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--input-len", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="starts of each kind; best counts")
    parser.add_argument("--top", type=int, default=5, help="how many slow programs to show")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    entered = time.time()
    args = parse_args()
    if args.once:
        print(json.dumps(start_once(args, entered)))
    else:
        compare_starts(args)


def start_once(args: argparse.Namespace, entered: float) -> Record:
    """Start the engine in this process and return the seconds of the parts."""
    began = float(os.environ[STARTED_VARIABLE])
    from jaxengine.bench.startup import measure_start

    names = ("load_format", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    names += ("tensor_parallel_size", "pipeline_parallel_size", "skip_tokenizer_init")
    measured = measure_start(
        args.model,
        {name: getattr(args, name) for name in names},
        input_len=args.input_len,
        began=began,
        entered=entered,
    )
    from benchmarks.records import run_record  # loads jax

    return run_record(args.model, measured.pop("dtype"), "startup") | measured


def compare_starts(args: argparse.Namespace) -> None:
    """Start cold and warm, each in a process of its own, and print what they took."""
    from tqdm import tqdm

    from benchmarks.records import publish

    starts: dict[str, list[Record]] = {"cold": [], "warm": []}
    with tqdm(total=2 * args.repeats, desc="starts") as bar:
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(prefix="jaxengine-cache-") as cache:
                for kind in starts:
                    starts[kind].append(start_child(cache))
                    bar.update()
    best = {kind: fastest(records) for kind, records in starts.items()}
    print_table(best)
    print_programs(best, args.top)
    publish([to_record(best, starts, args)], args.output)


def start_child(cache: str) -> Record:
    """Run this program once more, with the same arguments, to start the engine once."""
    import sys

    from benchmarks.records import run_child

    environment = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        STARTED_VARIABLE: repr(time.time()),
    }
    (record,) = run_child(["-m", "benchmarks.startup", *sys.argv[1:], "--once"], environment)
    return record


def fastest(records: Sequence[Record]) -> Record:
    return min(records, key=lambda record: record["seconds"])


def to_record(
    best: dict[str, Record], starts: dict[str, list[Record]], args: argparse.Namespace
) -> Record:
    """Join both kinds of start in one record, of which "seconds" is the cold one."""
    cold, warm = best["cold"], best["warm"]
    return cold | {
        "output_tok_s": None,
        "warm_seconds": warm["seconds"],
        "warm_parts": warm["parts"],
        "warm_num_cache_hits": warm["num_cache_hits"],
        "warm_programs": warm["programs"],
        "all": {kind: [each["seconds"] for each in records] for kind, records in starts.items()},
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
    }


def print_table(best: dict[str, Record]) -> None:
    print(f"{'cache':6}{'seconds':>9}" + "".join(f"{part:>9}" for part in PARTS) + "   programs")
    for kind, record in best.items():
        parts = "".join(f"{record['parts'][part]:9.2f}" for part in PARTS)
        print(
            f"{kind:6}{record['seconds']:9.2f}{parts}   {record['num_programs']} asked for, "
            f"{record['num_cache_hits']} from the cache"
        )


def print_programs(best: dict[str, Record], top: int) -> None:
    for kind, record in best.items():
        steps = sorted(record["step_programs"].items(), key=lambda item: -item[1])[:top]
        for name, seconds in steps or record["programs"][:top]:
            print(f"  {kind} {seconds:8.2f} s  {name}")


if __name__ == "__main__":
    main()
