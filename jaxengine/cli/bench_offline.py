"""``jaxengine bench latency | throughput``: flags of benchmarks on a model of this process."""

import argparse
from pathlib import Path
from typing import Any

import jaxengine
from jaxengine.bench.offline import measure_latency, measure_throughput
from jaxengine.bench.report import print_report, write_json
from jaxengine.cli.arguments import Parser, add_engine_arguments, engine_arguments, human_int
from jaxengine.cli.bench_serve import add_workload_arguments, workload_of
from jaxengine.sampling_params import SamplingParams

LATENCY_PERCENTILES = (10.0, 25.0, 50.0, 75.0, 90.0, 99.0)


def latency_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench latency``."""
    parser = _new_parser("latency", "Time one batch again and again.")
    for flag, default, text in (
        ("--input-len", 32, "tokens of a prompt"),
        ("--output-len", 128, "tokens of an output"),
        ("--batch-size", 8, "requests, all there at once"),
        ("--num-iters-warmup", 10, "batches before the clock runs"),
        ("--num-iters", 30, "batches that count"),
    ):
        parser.add_argument(
            flag, type=human_int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    return parser


def throughput_parser() -> argparse.ArgumentParser:
    """Return the parser of ``bench throughput``."""
    parser = _new_parser("throughput", "Time many requests that are all there at once.")
    add_workload_arguments(parser, 1000, 1024, 128)
    return parser


def run_latency(options: argparse.Namespace) -> int:
    """Measure, print and write; return the exit status.

    Raises:
        ValueError: If a flag is not possible.
    """
    params, llm = _params(options, options.output_len), _load(options)
    record = measure_latency(
        llm,
        batch_size=options.batch_size,
        input_len=options.input_len,
        params=params,
        num_iters_warmup=options.num_iters_warmup,
        num_iters=options.num_iters,
        seed=_seed(options),
        percentiles=LATENCY_PERCENTILES,
        show_progress=not options.disable_tqdm,
    )
    lines = {"Avg latency (s)": f"{record['avg_latency']:.4f}"}
    for name, title in (("batch", "batch"), ("ttft", "TTFT"), ("tpot", "TPOT")):
        for kind in ("mean", "median", "p99"):
            if (key := f"{kind}_{name}_ms") in record:
                lines[f"{kind.capitalize()} {title} (ms)"] = record[key]
    print_report("Latency benchmark", lines)
    sizes = {k: getattr(options, k) for k in ("batch_size", "input_len", "output_len", "n")}
    _write(options, sizes | record)
    return 0


def run_throughput(options: argparse.Namespace) -> int:
    """Measure, print and write; return the exit status.

    Raises:
        ValueError: If a flag is not possible.
    """
    workload = workload_of(options, _seed(options))
    params, llm = _params(options, options.output_len), _load(options)
    record = measure_throughput(llm, workload, params, show_progress=not options.disable_tqdm)
    lines = {
        "Requests": record["num_requests"],
        "Duration (s)": record["elapsed_time"],
        "Total input tokens": record["total_input_tokens"],
        "Total generated tokens": record["total_output_tokens"],
        "Request throughput (req/s)": record["requests_per_second"],
        "Output token throughput (tok/s)": record["output_tokens_per_second"],
        "Total token throughput (tok/s)": record["tokens_per_second"],
    }
    print_report("Throughput benchmark", lines)
    _write(options, record)
    return 0


def _new_parser(kind: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"jaxengine bench {kind}",
        description=description,
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    add_engine_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks (default: False)")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="hub name, directory or file"
    )
    parser.add_argument("--n", type=int, default=1, help="outputs of a prompt (default: 1)")
    parser.add_argument(
        "--disable-detokenize", action="store_true", help="make no text, need no tokenizer"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="gets all numbers")
    parser.add_argument("--disable-tqdm", action="store_true", help="draw no progress bar")
    return parser


def _params(options: argparse.Namespace, output_len: int) -> SamplingParams:
    if output_len < 1:
        raise ValueError(f"--output-len is {output_len}: it must be at least 1")
    return SamplingParams(
        n=options.n,
        temperature=1.0 if options.n > 1 else 0.0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=not options.disable_detokenize,
    )


def _load(options: argparse.Namespace) -> Any:
    """Load the model. Random prompts share nothing: the prefix cache is off unless asked for."""
    own: dict[str, Any] = {"enable_prefix_caching": False, "disable_log_stats": True}
    if options.disable_detokenize:
        own["skip_tokenizer_init"] = True
    return jaxengine.LLM(options.model, **{**own, **engine_arguments(options)})


def _seed(options: argparse.Namespace) -> int:
    return max(0, getattr(options, "seed", 0))


def _write(options: argparse.Namespace, record: dict[str, Any]) -> None:
    write_json({"model": options.model, **record}, options.output_json)
