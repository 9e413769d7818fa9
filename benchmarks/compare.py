"""The best of our results next to the peers' on the same kind of card, and a plot of both.

    python -m benchmarks.compare --results benchmarks/results/h200.jsonl \
        --peers benchmarks/peers/h200-vllm-0.26.0.jsonl --plot docs/h200.svg

Prints a table of seconds and ratios (below 1: we are faster) and last one JSON line. The plot needs
matplotlib, which the package itself does not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

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
    ratios = {}
    print(f"{'model':15}{'workload':16}{'ours s':>9}{'peer s':>9}{'ratio':>8}")
    for key, record in sorted(ours.items()):
        peer = peers.get(key)
        line = f"{key[0]:15}{key[1]:16}{record['seconds']:9.3f}"
        if peer is not None:
            ratios[key] = record["seconds"] / peer["seconds"]
            line += f"{peer['seconds']:9.3f}{ratios[key]:8.3f}"
        print(line)
    if args.plot:
        plot(ours, peers, args)
    print(json.dumps({"ratios": {"/".join(key): round(r, 4) for key, r in ratios.items()}}))


def plot(ours: dict, peers: dict, args: argparse.Namespace) -> None:
    """Draw output tokens per second of both, for the workloads that both have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = sorted(key for key in ours if key in peers)
    figure, axes = pyplot.subplots(1, len(keys), figsize=(2.6 * len(keys), 2.8))
    for axis, key in zip(axes, keys, strict=True):
        values = [peers[key]["output_tok_s"], ours[key]["output_tok_s"]]
        bars = axis.bar(
            [args.peers.stem.split("-")[1], "jaxengine"], values, color=["#999", "#47a"]
        )
        axis.bar_label(bars, fmt="{:,.0f}", padding=2)
        axis.set_title(f"{key[1]}\n{key[0]}", fontsize=9)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("output tokens per second")
    figure.tight_layout()
    figure.savefig(args.plot)


if __name__ == "__main__":
    main()
