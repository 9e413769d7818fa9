"""What one request waits for: time to first token and time per output token, by batch size.

    python -m benchmarks.latency --model benchmarks/models/llama-3.1-8b --load-format dummy \
        --input-len 128 --output-len 128 --batch-size 1 8 64

All requests of a batch are there at once, so the first token of each waits for the prompts of all.
Both times come from the metrics of ``RequestOutput``: arrival to first token, and the mean gap
between a request's tokens; percentiles are over the requests of all iterations. "batch" is what a
whole ``LLM.generate`` call takes. ``--stream`` times every token of ``LLM.stream`` instead, one
request at a time, which shows single slow steps. Prints a table, and last one JSON line a batch
size; ``--output`` appends those to a file.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.records import Record, percentiles, publish, run_record
from jaxengine import LLM, SamplingParams
from jaxengine.bench.offline import time_per_output_token

Times = dict[str, list[float]]  # seconds of "ttft", "tpot" and "batch"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--num-iters-warmup", type=int, default=2)
    parser.add_argument("--num-iters", type=int, default=10)
    parser.add_argument("--stream", action="store_true", help="one request, every token timed")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.output_len < 2:
        parser.error(f"--output-len {args.output_len}: a time per output token needs at least 2")
    return args


def main() -> None:
    args = parse_args()
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        data_parallel_size=args.data_parallel_size,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    batch_sizes = [1] if args.stream else args.batch_size
    records = []
    total = len(batch_sizes) * (args.num_iters_warmup + args.num_iters)
    with tqdm(total=total, desc="batches") as bar:
        for batch_size in batch_sizes:
            times = measure(llm, batch_size, args, bar)
            records.append(to_record(llm.startup.model.dtype, batch_size, times, args))
    print_table(records)
    publish(records, args.output)


def measure(llm: LLM, batch_size: int, args: argparse.Namespace, bar: tqdm) -> Times:
    """Run the warm-up and the iterations of a batch size."""
    times: Times = {"ttft": [], "tpot": [], "batch": []}
    rng = np.random.default_rng(0)
    vocab_size = llm.startup.model.vocab_size
    for iteration in range(args.num_iters_warmup + args.num_iters):
        prompts = rng.integers(0, vocab_size, (batch_size, args.input_len)).tolist()
        one = stream_once(llm, prompts[0], args) if args.stream else run_once(llm, prompts, args)
        if iteration >= args.num_iters_warmup:
            for name, seconds in one.items():
                times[name] += seconds
        bar.update()
    return times


def run_once(llm: LLM, prompts: list[list[int]], args: argparse.Namespace) -> Times:
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling_params(args), use_tqdm=False)
    seconds = time.perf_counter() - started
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    assert len(metrics) == len(prompts), "the engine records the metrics of every request"
    return {
        "ttft": [metric.first_token_latency for metric in metrics],
        "tpot": [time_per_output_token(metric) for metric in metrics],
        "batch": [seconds],
    }


def stream_once(llm: LLM, prompt: list[int], args: argparse.Namespace) -> Times:
    """Time every token of one stream; "tpot" holds all gaps instead of their mean."""
    arrivals = [time.perf_counter()]
    num_seen = 0
    for output in llm.stream(prompt, sampling_params(args)):
        num_tokens = len(output.outputs[0].token_ids)
        if num_tokens > num_seen:
            arrivals.append(time.perf_counter())
            num_seen = num_tokens
    first, *gaps = np.diff(arrivals).tolist()
    return {"ttft": [first], "tpot": gaps, "batch": [arrivals[-1] - arrivals[0]]}


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=args.output_len, ignore_eos=True, detokenize=False
    )


def to_record(dtype: str, batch_size: int, times: Times, args: argparse.Namespace) -> Record:
    median = float(np.median(times["batch"]))
    name = "latency-stream" if args.stream else f"latency-{batch_size}"
    workload = f"{name}x({args.input_len},{args.output_len})"
    return run_record(args.model, dtype, workload) | {
        "batch_size": batch_size,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "num_iters": args.num_iters,
        "seconds": round(median, 4),
        "output_tok_s": round(batch_size * args.output_len / median, 1),
        "ttft_ms": percentiles(times["ttft"], 1e3),
        "tpot_ms": percentiles(times["tpot"], 1e3),
        "batch_ms": percentiles(times["batch"], 1e3),
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "data_parallel_size": args.data_parallel_size,
    }


def print_table(records: Sequence[Record]) -> None:
    names = {"ttft_ms": "first token ms", "tpot_ms": "per token ms", "batch_ms": "batch ms"}
    heads = "".join(f"{name + ': median':>24}{'p90':>10}{'p99':>10}" for name in names.values())
    print(f"{'batch':>6}{heads}{'out tok/s':>12}")
    for record in records:
        cells = "".join(
            f"{record[key]['median']:24.2f}{record[key]['p90']:10.2f}{record[key]['p99']:10.2f}"
            for key in names
        )
        print(f"{record['batch_size']:6}{cells}{record['output_tok_s']:12.1f}")


if __name__ == "__main__":
    main()
