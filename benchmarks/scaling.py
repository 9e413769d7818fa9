"""How speed grows with the number of devices: measured here, or predicted for H200s.

    python -m benchmarks.scaling --model benchmarks/models/llama-3.1-8b --load-format dummy
    python -m benchmarks.scaling                # a tiny model on virtual CPU devices: only a trial
    python -m benchmarks.scaling --predict      # no device needed; the tables of docs/scaling.md
    python -m benchmarks.scaling --predict --model benchmarks/models/llama-3.1-70b --sizes 8,1,1

Measuring runs ``benchmarks.throughput`` once for each (tensor, pipeline, data) parallel size, in a
process of its own. What the engine refuses becomes a row that says so. Prints a table, and last one
JSON line.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

from tqdm import tqdm

from benchmarks.records import ChildError, Record, run_child
from benchmarks.scaling_model import Layout
from benchmarks.scaling_predict import (
    MODELS,
    PRESETS,
    predict,
    predict_workloads,
    print_predictions,
    print_validation,
    print_workloads,
    read_model,
    validate,
)
from benchmarks.workloads import WORKLOADS

COUNT_DEVICES = (
    "import jax, json; print(json.dumps({'count': len(jax.devices()), 'kind':"
    " jax.devices()[0].device_kind, 'platform': jax.default_backend()}))"
)


def parse_sizes(text: str) -> Layout:
    """Read "8,2,1": tensor, pipeline and data parallel size; sizes left out are 1.

    Raises:
        argparse.ArgumentTypeError: If these are not one to three positive integers.
    """
    parts = text.split(",")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not tensor,pipeline,data: write three positive integers, such as 4,2,1"
        )
    return Layout(*map(int, parts))


def default_layouts(num_devices: int) -> list[Layout]:
    """Return all layouts of powers of two whose product divides the devices, smallest first."""
    powers = [1 << i for i in range(num_devices.bit_length()) if num_devices % (1 << i) == 0]
    layouts = [Layout(*sizes) for sizes in itertools.product(powers, repeat=3)]
    usable = [layout for layout in layouts if num_devices % layout.num_devices == 0]
    return sorted(usable, key=lambda each: (each.num_devices, -each.tensor, -each.pipeline))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="calculate, do not measure")
    parser.add_argument("--model", help="its directory; left out: a tiny one, or all tables")
    parser.add_argument("--sizes", nargs="+", type=parse_sizes, help="tensor,pipeline,data")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--workload", choices=sorted(WORKLOADS), help="left out: decode-heavy; on a CPU, batch-8"
    )
    measuring.add_argument("--load-format", default="auto")
    measuring.add_argument("--dtype", default="auto")
    measuring.add_argument("--repeats", type=int, default=3)
    measuring.add_argument("--virtual-devices", type=int, default=8, help="on a CPU")
    measuring.add_argument("--output", type=Path, help="append the runs' JSON lines to this file")
    predicting = parser.add_argument_group("predicting")
    predicting.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 256, 1024])
    predicting.add_argument("--context", type=int, default=1024)
    predicting.add_argument("--weight-bits", type=int, default=16, choices=(4, 8, 16))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    report = print_prediction(args) if args.predict else measure(args)
    print(json.dumps(report))


def print_prediction(args: argparse.Namespace) -> Record:
    """Print one model's table, or the validation and all tables."""
    print(
        "Predictions for H200s, not measurements. Tokens per second: likely (careful to hopeful)."
    )
    if args.model:
        layouts = args.sizes or default_layouts(8)
        jobs = [(Path(args.model), tuple(layouts), args.weight_bits)]
        validation, workloads = [], []
    else:
        jobs = [(MODELS / each.model, each.layouts, each.weight_bits) for each in PRESETS]
        validation = validate()
        print("\nAgainst measurements\n")
        print_validation(validation)
        workloads = predict_workloads()
        print("\nllama-3.1-8b, seconds of whole workloads: likely (hopeful to careful)\n")
        print_workloads(workloads)
    tables = []
    for directory, layouts, bits in jobs:
        records = predict(read_model(directory), layouts, args.rows, args.context, bits)
        tables.append({"model": directory.name, "weight_bits": bits, "layouts": records})
        print(f"\n{directory.name}, weights of {bits} bits, context {args.context:,}\n")
        print_predictions(records, args.rows)
    report = {"validation": validation, "workloads": workloads, "tables": tables}
    return {"benchmark": "scaling-prediction", **report}


def measure(args: argparse.Namespace) -> Record:
    """Run the workload on each layout and print speed-up, efficiency and bytes."""
    environment = {}
    (devices,) = run_child(["-c", COUNT_DEVICES])
    is_cpu = devices["platform"] == "cpu"
    if is_cpu:
        flags = f"--xla_force_host_platform_device_count={args.virtual_devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        devices["count"] = args.virtual_devices
        print(
            "These devices are virtual: all of them are the same CPU cores. The figures show that "
            "it runs, and mean nothing."
        )
    print(f"{devices['count']} x {devices['kind']}")
    layouts = args.sizes or default_layouts(devices["count"])
    rows = []
    for layout in (progress := tqdm(layouts, desc="layouts")):
        progress.set_postfix_str(str(layout))
        rows.append(run_layout(layout, args, is_cpu, environment))
    for row in rows:
        add_speed_up(row, rows[0])
    print_measurements(rows)
    return {"benchmark": "scaling", "is_virtual": is_cpu, **devices, "layouts": rows}


def run_layout(
    layout: Layout, args: argparse.Namespace, is_cpu: bool, environment: dict[str, str]
) -> Record:
    """Run one layout; what it cannot do is the row's ``error``."""
    row: Record = {"layout": str(layout), "num_devices": layout.num_devices}
    is_tiny = args.model is None
    command = ["-m", "benchmarks.throughput"]
    command += ["--model", str(MODELS / "tiny-llama") if is_tiny else args.model]
    command += ["--load-format", "dummy" if is_tiny else args.load_format, "--dtype", args.dtype]
    command += ["--workload", args.workload or ("batch-8" if is_cpu else "decode-heavy")]
    command += ["--repeats", str(args.repeats)]
    command += ["--tensor-parallel-size", str(layout.tensor)]
    command += ["--pipeline-parallel-size", str(layout.pipeline)]
    command += ["--data-parallel-size", str(layout.data)]
    if args.output:
        command += ["--output", str(args.output)]
    try:
        (record,) = run_child(command, environment)
    except ChildError as error:
        is_refusal = str(error).startswith("ValueError")
        return {**row, "error": f"{'not supported' if is_refusal else 'failed'}: {error}"}
    return {**row, **record}


def add_speed_up(row: Record, first: Record) -> None:
    """Add speed-up, and efficiency a device, against the first layout, if both ran."""
    if "error" not in row and "error" not in first:
        row["speed_up"] = row["output_tok_s"] / first["output_tok_s"]
        row["efficiency"] = row["speed_up"] * first["num_devices"] / row["num_devices"]


def print_measurements(rows: list[Record]) -> None:
    print(
        f"{'layout':18}{'devices':>8}{'out tok/s':>12}{'speed-up':>10}{'efficiency':>12}"
        f"{'weights':>10}{'cache':>10}{'all arrays, MB on each device':>32}"
    )
    for row in rows:
        head = f"{row['layout']:18}{row['num_devices']:8}"
        if "error" in row:
            print(f"{head}  {row['error'][:160]}")
            continue
        ratios = f"{'-':>10}{'-':>12}"
        if "speed_up" in row:
            ratios = f"{row['speed_up']:10.2f}{row['efficiency']:12.1%}"
        sizes = "".join(f"{row[key] / 1e6:10,.1f}" for key in ("weight_bytes", "cache_bytes"))
        live = " ".join(f"{size / 1e6:,.1f}" for size in row["live_bytes"])
        print(f"{head}{row['output_tok_s']:12,.1f}{ratios}{sizes}  {live}")


if __name__ == "__main__":
    main()
