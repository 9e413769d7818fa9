"""``jaxengine bench startup``: flags of starts with and without compiled programs at hand."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxengine.bench.report import print_report, statistics, write_json
from jaxengine.bench.startup import start_once
from jaxengine.cli.arguments import Parser, add_engine_arguments, engine_arguments, human_int


def startup_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(
        prog="jaxengine bench startup",
        description="Time starts of the engine up to the first token, each in its own process: "
        "cold with no compiled program at hand, warm with those of the start before.",
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    add_engine_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks (default: False)")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="hub name, directory or file"
    )
    for flag, default in (("--num-iters-cold", 1), ("--num-iters-warm", 1)):
        parser.add_argument(
            flag, type=human_int, default=default, metavar="N", help=f"starts (default: {default})"
        )
    parser.add_argument(
        "--input-len", type=human_int, default=8, metavar="N", help="of the prompt (default: 8)"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="gets all numbers")
    parser.add_argument("--disable-tqdm", action="store_true", help="draw no progress bar")
    return parser


def run_startup(options: argparse.Namespace) -> int:
    """Measure, print and write; return the exit status.

    Raises:
        ValueError: If a flag is not possible, or the engine cannot start.
    """
    numbers = {"cold": options.num_iters_cold, "warm": options.num_iters_warm}
    for flag, value in (
        ("--num-iters-cold", numbers["cold"]),  # a warm start needs one before it
        ("--input-len", options.input_len),
    ):
        if value < 1:
            raise ValueError(f"{flag} is {value}: it must be at least 1")
    if numbers["warm"] < 0:
        raise ValueError(f"--num-iters-warm is {numbers['warm']}: it must be at least 0")
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    engine_args = engine_arguments(options)
    total = sum(numbers.values())
    with tqdm(total=total, desc="starts", disable=options.disable_tqdm) as bar:
        for index in range(numbers["cold"]):
            with tempfile.TemporaryDirectory(prefix="jaxengine-cache-") as cache:
                is_last = index == numbers["cold"] - 1
                for kind in ("cold", *["warm"] * (numbers["warm"] if is_last else 0)):
                    starts[kind].append(
                        start_once(options.model, engine_args, cache, options.input_len)
                    )
                    bar.update()
    record: dict[str, Any] = {"model": options.model, "starts": starts}
    for kind, each in starts.items():
        record |= statistics(f"{kind}_start", [start["seconds"] for start in each])
        if each:
            best = min(each, key=lambda start: start["seconds"])
            lines = {"Seconds to the first token": best["seconds"]}
            lines |= {f"  {part}": seconds for part, seconds in best["parts"].items()}
            lines["Programs asked for"] = best["num_programs"]
            lines["Programs from the cache"] = best["num_cache_hits"]
            print_report(f"Start, {kind} (best of {len(each)})", lines)
    write_json(record, options.output_json)
    return 0
