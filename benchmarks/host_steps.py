"""What the host does in a step, in milliseconds, and whether the GPU ever waits for it.

    python -m benchmarks.host_steps --model benchmarks/models/llama-3.1-8b --load-format dummy \
        --workload decode-heavy

Times the parts of each engine step in a whole ``LLM.generate`` call:

    schedule   decide what the step computes
    prepare    put the step and its sampling parameters into two vectors
    dispatch   launch the programs
    wait       for the tokens of the step before
    update     give the scheduler the tokens
    output     stop strings, text (``--detokenize``) and logprobs, outputs for the user

While the host waits, a step is running and the next one is queued behind it: the GPU has work. So
"ahead" is the share of steps in which the host had to wait; in the others the GPU may have run dry,
for no longer than the step's work on the host. A profiler would show gaps, but it slows the
launches that cause them. Prints a table, and last one JSON line a workload.
"""

import argparse
import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import Record, percentiles, publish, run_record
from benchmarks.workloads import WORKLOADS, Workload, prompts_of
from jaxengine import LLM, SamplingParams
from jaxengine.engine.engine import Engine

PARTS = ("schedule", "prepare", "dispatch", "wait", "update", "output")
LEAST_WAIT_S = 100e-6  # reading tokens that are there already takes 40 us on an H100's host


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=["smoke"])
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--detokenize", action="store_true", help="the model brings a tokenizer")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        enable_prefix_caching=False,
        skip_tokenizer_init=not args.detokenize,
    )
    records = []
    for name in args.workload:
        generate(llm, WORKLOADS[name], args.detokenize)
        with timed_steps(llm) as steps:
            generate(llm, WORKLOADS[name], args.detokenize)
        record = run_record(args.model, llm.engine.model_config.dtype, f"{name}, host steps")
        records.append(record | summary(steps))
        print_table(name, records[-1])
    publish(records, args.output)


def generate(llm: LLM, workload: Workload, detokenize: bool = False) -> float:
    """Run a workload, greedy and to its full length; return the seconds of the call."""
    prompts = prompts_of(workload, llm.engine.model_config.vocab_size)
    params = [
        SamplingParams(temperature=0, max_tokens=n_out, ignore_eos=True, detokenize=detokenize)
        for _, n_out in workload
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in workload]
    return seconds


@contextlib.contextmanager
def timed_steps(llm: LLM) -> Iterator[list[dict[str, float]]]:
    """Collect the seconds of each step that is run inside: of its parts, and of all as "step"."""
    engine = llm.engine
    if not isinstance(engine, Engine):
        raise SystemExit("host_steps measures one engine: leave out data_parallel_size")
    places: list[tuple[str, Any, str]] = [
        ("schedule", engine.scheduler, "schedule"),
        ("prepare", engine.runner, "prepare"),
        ("dispatch", engine.runner, "dispatch"),
        ("wait", engine, "read"),
        ("update", engine.scheduler, "update_from_output"),
        ("output", llm._requests.processor, "process"),
    ]
    running: collections.Counter[str] = collections.Counter()
    steps: list[dict[str, float]] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            running[part] += time.perf_counter() - start  # type: ignore[assignment]
            return result

        return call

    loop = llm._requests
    run_step = loop._step

    def step(own: Any) -> None:
        running.clear()
        start = time.perf_counter()
        run_step(own)
        steps.append({**running, "step": time.perf_counter() - start})

    for part, owner, name in places:
        setattr(owner, name, timed(part, getattr(owner, name)))
    loop._step = step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        for _, owner, name in places:
            delattr(owner, name)
        del loop._step


def summary(steps: list[dict[str, float]]) -> Record:
    """Return the percentiles of all parts in milliseconds, and how often the host was ahead."""
    parts = {part: np.array([s.get(part, 0.0) for s in steps]) for part in (*PARTS, "step")}
    middle = slice(2, -2)  # the first steps fill the pipeline, the last ones drain it
    wait, step = parts["wait"][middle], parts["step"][middle]
    return {
        "num_steps": len(parts["step"]),
        "ms": {part: percentiles(seconds[middle], 1e3) for part, seconds in parts.items()},
        "ahead": round(float(np.mean(wait > LEAST_WAIT_S)), 4),
        "waiting_share": round(float(wait.sum() / step.sum()), 4),
    }


def print_table(name: str, record: Record) -> None:
    print(f"{name}: {record['num_steps']} steps{'median':>13}{'p90':>9}{'p99':>9}  milliseconds")
    for part, values in record["ms"].items():
        print(f"  {part:16}{values['median']:20.3f}{values['p90']:9.3f}{values['p99']:9.3f}")
    print(
        f"  the host was ahead in {record['ahead']:.1%} of the steps, and waited "
        f"{record['waiting_share']:.1%} of the time"
    )


if __name__ == "__main__":
    main()
