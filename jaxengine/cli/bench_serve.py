"""``jaxengine bench serve``: flags of a load on a server of OpenAI's kind."""

import argparse
import asyncio
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxengine.bench.report import print_report, write_json
from jaxengine.bench.serving import METRICS, send_all, summarise
from jaxengine.bench.workload import RandomWorkload, arrival_times
from jaxengine.cli.arguments import Parser, human_int, json_object
from jaxengine.cli.remote import RemoteModel, base_url, key_headers

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def add_workload_arguments(parser: Any, num_prompts: int, input_len: int, output_len: int) -> None:
    """Add the flags of a ``RandomWorkload``, with the defaults of a command."""
    parser.add_argument(
        "--dataset-name", choices=["random"], default="random", help="default: %(default)s"
    )
    for names, default, text in (
        (("--num-prompts",), num_prompts, "requests"),
        (("--input-len", "--random-input-len"), input_len, "tokens of a prompt"),
        (("--output-len", "--random-output-len"), output_len, "tokens of an output"),
        (("--random-prefix-len",), 0, "tokens that all prompts begin with"),
    ):
        parser.add_argument(
            *names,
            type=human_int,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="lengths vary by this share of theirs (default: 0)",
    )


def workload_of(options: argparse.Namespace, seed: int) -> RandomWorkload:
    """Return what the flags describe.

    Raises:
        ValueError: If it is not possible.
    """
    return RandomWorkload(
        options.num_prompts,
        options.input_len,
        options.output_len,
        options.random_range_ratio,
        options.random_prefix_len,
        seed,
    )


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(
        prog="jaxengine bench serve",
        description="Send random prompts to a server of OpenAI's kind, and time what comes back.",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--base-url", help="such as http://localhost:8000; goes before --host")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0], help="default: %(default)s"
    )
    parser.add_argument("--model", metavar="NAME", help="default: the first that is listed")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="hub name or directory (default: the model's name)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    add_workload_arguments(parser, 1000, 1024, 128)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--request-rate", type=float, default=float("inf"), help="a second (default: all at once)"
    )
    parser.add_argument(
        "--burstiness", type=float, default=1.0, help="1 is Poisson, less is bursts (default: 1)"
    )
    parser.add_argument("--max-concurrency", type=human_int, help="requests at a time")
    parser.add_argument(
        "--num-warmups", type=int, default=1, help="requests before the clock runs (default: 1)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    parser.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send ignore_eos, which OpenAI's own servers refuse (default: True)",
    )
    parser.add_argument("--extra-body", type=json_object, default={}, help="fields, as JSON")
    parser.add_argument(
        "--metric-percentiles", type=_percentiles, default=(99.0,), help="such as 50,90,99"
    )
    parser.add_argument(
        "--goodput", nargs="+", metavar="NAME:MS", help="such as ttft:200 tpot:30; also e2el"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="gets all numbers")
    parser.add_argument("--disable-tqdm", action="store_true", help="draw no progress bar")
    return parser


def run_serve(options: argparse.Namespace) -> int:
    """Measure, print and write; return the exit status: 1 if no request has succeeded.

    Raises:
        ValueError: If a flag is not possible, or the server does not answer.
    """
    workload = workload_of(options, options.seed)
    if options.max_concurrency is not None and options.max_concurrency < 1:
        raise ValueError(f"--max-concurrency is {options.max_concurrency}: it must be at least 1")
    arrivals = arrival_times(
        workload.num_prompts, options.request_rate, options.burstiness, options.seed
    )
    goodput = _goodput(options.goodput or ())
    address = options.base_url or f"http://{options.host}:{options.port}"
    root = base_url(address).removesuffix("/v1")
    model = RemoteModel(address, options.model, options.api_key).name
    bodies = make_bodies(options, model, workload)
    timings, seconds = asyncio.run(_measure(options, root, bodies, arrivals))
    numbers = summarise(timings, seconds, percentiles=options.metric_percentiles, goodput=goodput)
    record = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "endpoint": root + options.endpoint,
        "model": model,
        "num_prompts": workload.num_prompts,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "request_rate": _json_rate(options.request_rate),
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **numbers,
    }
    _print(numbers)
    for problem in sorted({each.problem for each in timings if each.problem})[:5]:
        print(f"failed: {problem}", file=sys.stderr)
    write_json(record, options.output_json)
    return 0 if numbers["completed"] else 1


async def _measure(
    options: argparse.Namespace,
    root: str,
    bodies: Sequence[Mapping[str, Any]],
    arrivals: Sequence[float],
) -> tuple[list[Any], float]:
    url, headers = root + options.endpoint, key_headers(options.api_key)
    first = [bodies[i % len(bodies)] for i in range(options.num_warmups)]
    if first:
        warm, _ = await send_all(
            url, first, [0.0] * len(first), headers=headers, show_progress=False
        )
        if warm[0].problem:
            raise ValueError(f"the first request has failed: {warm[0].problem}")
    return await send_all(
        url,
        bodies,
        arrivals,
        headers=headers,
        max_concurrency=options.max_concurrency,
        show_progress=not options.disable_tqdm,
    )


def make_bodies(
    options: argparse.Namespace, model: str, workload: RandomWorkload
) -> list[dict[str, Any]]:
    """Return the requests: token ids for completions, their text for chats.

    Raises:
        ValueError: If the tokenizer cannot be loaded.
    """
    from jaxengine.text.tokenizer import load_tokenizer  # takes seconds

    source = options.tokenizer or model
    try:
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer names another directory or hub name") from None
    special = set(tokenizer.hf_tokenizer.all_special_ids)
    token_ids = [i for i in range(tokenizer.num_tokens) if i not in special]
    bodies = []
    for prompt, num_output in workload.draw(token_ids):
        body: dict[str, Any] = {
            "model": model,
            "temperature": options.temperature,
            "max_tokens": num_output,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        if options.endpoint == ENDPOINTS[0]:
            body["prompt"] = prompt
        else:
            text = tokenizer.decode(prompt)
            body["messages"] = [{"role": "user", "content": text}]
        bodies.append({**body, **options.extra_body})
    return bodies


def _print(numbers: Mapping[str, Any]) -> None:
    lines = {
        "Successful requests": numbers["completed"],
        "Failed requests": numbers["failed"],
        "Benchmark duration (s)": numbers["duration"],
        "Total input tokens": numbers["total_input_tokens"],
        "Total generated tokens": numbers["total_output_tokens"],
        "Request throughput (req/s)": numbers["request_throughput"],
        "Output token throughput (tok/s)": numbers["output_throughput"],
        "Total token throughput (tok/s)": numbers["total_token_throughput"],
    }
    if "request_goodput" in numbers:
        lines["Request goodput (req/s)"] = numbers["request_goodput"]
    for name in METRICS:
        for key, value in numbers.items():
            if key.endswith(f"_{name}_ms"):
                kind = key.removesuffix(f"_{name}_ms")
                shown = kind.capitalize() if kind.isalpha() else kind.upper()
                lines[f"{shown} {NAMES[name]} (ms)"] = value
    print_report("Serving benchmark", lines)


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(each) for each in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= each <= 100 for each in values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 0 to 100")
    return values


def _goodput(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for each in given:
        name, _, limit = each.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            raise ValueError(f"--goodput {each!r} must be NAME:MILLISECONDS") from None
        if name not in ("ttft", "tpot", "e2el"):
            raise ValueError(f"--goodput {each!r}: the name must be ttft, tpot or e2el")
    return found


def _json_rate(rate: float) -> float | str:
    return "inf" if rate == float("inf") else rate
