"""The best of our results next to the peers' on the same kind of card and the floor, and a plot.

    python -m benchmarks.compare --results benchmarks/results/h200.jsonl \
        --peers benchmarks/peers/h200-vllm-0.26.0.jsonl --plot docs/h200.svg

Prints a table of seconds and ratios (below 1: we are faster) and last one JSON line. The floor is
what bytes and arithmetic alone would take on one device (floor.py); there is none for a device of
unknown rates, or for a workload or model that is not in this directory. The plot needs matplotlib,
which the package itself does not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.floor import floor_s, rates_of
from benchmarks.records import read_model
from benchmarks.workloads import WORKLOADS

MODELS = Path(__file__).parent / "models"

Key = tuple[str, str]  # model, workload


def best_of(path: Path) -> dict[Key, dict[str, Any]]:
    """The fastest record of each model and workload, plain bf16 runs only."""
    best: dict[Key, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "workload" not in record or record.get("args", {}).get("quantization"):
            continue
        key = record["model"], record["workload"]
        if key not in best or record["seconds"] < best[key]["seconds"]:
            best[key] = record
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="write a bar chart here (.png or .svg)")
    args = parser.parse_args()
    ours, peers = best_of(args.results), best_of(args.peers)
    ratios, floors = {}, {}
    columns = "".join(f"{name:>9}" for name in ("ours s", "peer s", "ratio", "floor s", "share"))
    print(f"{'model':15}{'workload':16}{columns}")
    for key, record in sorted(ours.items()):
        line = f"{key[0]:15}{key[1]:16}{record['seconds']:9.3f}"
        if key in peers:
            ratios[key] = record["seconds"] / peers[key]["seconds"]
            line += f"{peers[key]['seconds']:9.3f}{ratios[key]:9.3f}"
        floor = floor_of(key, record)
        if floor is not None:
            floors[key] = floor
            line = f"{line:58}{floor:9.3f}{floor / record['seconds']:9.1%}"
        print(line)
    if args.plot:
        plot(ours, peers, args)
    named = {"ratios": ratios, "floors_s": floors}
    print(json.dumps({name: by_key(values) for name, values in named.items()}))


def by_key(values: dict[Key, float]) -> dict[str, float]:
    return {"/".join(key): round(value, 4) for key, value in values.items()}


def floor_of(key: Key, record: dict[str, Any]) -> float | None:
    """Return the least seconds of a record's workload; None if it has no floor."""
    rates, directory = rates_of(record["device"]), MODELS / key[0]
    if rates is None or key[1] not in WORKLOADS or not directory.exists():
        return None
    return floor_s(WORKLOADS[key[1]], read_model(directory), rates)


def plot(ours: dict, peers: dict, args: argparse.Namespace) -> None:
    """Draw output tokens per second of both, for the workloads that both have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models: dict[str, list[Key]] = {}  # a row of bars each
    for key in sorted(key for key in ours if key in peers):
        models.setdefault(key[0], []).append(key)
    columns = max(map(len, models.values()))
    figure, grid = pyplot.subplots(
        len(models), columns, figsize=(2.2 * columns, 2.5 * len(models)), squeeze=False
    )
    for axis in grid.flat:
        axis.set_axis_off()
    names = [args.peers.stem.split("-")[1], "jaxengine"]
    for axes, keys in zip(grid, models.values(), strict=True):
        for axis, key in zip(axes, keys, strict=False):
            axis.set_axis_on()
            values = [peers[key]["output_tok_s"], ours[key]["output_tok_s"]]
            bars = axis.bar(names, values, color=["#999", "#47a"])
            axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
            axis.set_title(f"{key[1]}\n{key[0]}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.margins(y=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("output tokens per second", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.plot)


if __name__ == "__main__":
    main()
