"""Tables of predictions, and how the same arithmetic does where there are measurements.

Everything is for the H200. ``python -m benchmarks.scaling --predict`` prints what is here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from benchmarks.records import ROOT, Record, read_model
from benchmarks.scaling_model import CostModel, Layout
from benchmarks.scaling_pieces import WIRES, Pieces, Wires, h200_pieces, read_records
from benchmarks.workloads import WORKLOADS
from jaxengine.model_config import ModelConfig

SIZE_FIELDS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
MODELS = ROOT / "benchmarks/models"
LLAMA_8B = "llama-3.1-8b"
OURS = "results/h200.jsonl"
VLLM = "peers/h200-vllm-0.26.0.jsonl"
VLLM_TP2 = "peers/h200x2-vllm-0.26.0-tp2.jsonl"
NO_WIRES = Wires("none", 0.0, 0.0, math.inf, math.inf, 0.0, 0.0)
PREFILL = (128, 2048)  # prompts, tokens of each: the workload prefill-heavy
WORKLOAD_COLUMNS = ("single", "decode-heavy", "chat", "prefill-heavy", "long-context")
BASE_ROWS = 256  # for efficiency and the share of the wires, if asked for


@dataclasses.dataclass(frozen=True)
class Preset:
    """A table that is printed if nothing else is asked for; efficiency is against its first row."""

    model: str
    layouts: tuple[Layout, ...]
    weight_bits: int = 16


ON_ONE_HOST = (Layout(), Layout(1, 1, 8), Layout(2, 1, 4), Layout(1, 8), Layout(4, 2))
ON_MORE_HOSTS = (
    *(Layout(8), Layout(8, 2), Layout(8, 1, 2), Layout(16)),
    *(Layout(8, 4), Layout(8, 1, 4)),
)
PRESETS = (
    Preset(LLAMA_8B, tuple(Layout(n) for n in (1, 2, 4, 8))),
    Preset(LLAMA_8B, ON_ONE_HOST),
    Preset("llama-2-13b", (Layout(), Layout(2), Layout(4), Layout(2, 2))),
    Preset("llama-3.1-70b", (Layout(2), Layout(4), Layout(8), Layout(4, 2), Layout(4, 1, 2))),
    Preset("llama-3.1-70b", ON_MORE_HOSTS),
    Preset("llama-3.1-405b", (Layout(8),), weight_bits=8),
    Preset("llama-3.1-405b", (Layout(8), Layout(8, 2), Layout(16), Layout(8, 4), Layout(8, 2, 2))),
)

# Whole steps of Llama-3.1-8B. Source: LOG.md, "XLA options for a step": the better column.
MEASURED_DECODE_MS = {(64, 256): 5.50, (256, 384): 10.34, (512, 200): 15.90, (1024, 120): 28.10}
MEASURED_PREFILL_MS = {1: 49.0, 8: 380.1}  # prompts of 2,048 tokens


@functools.cache
def measured_seconds(file: str) -> dict[str, float]:
    """Best seconds of Llama-3.1-8B in bf16 by workload, from a file of results."""
    best: dict[str, float] = {}
    for record in read_records(ROOT / "benchmarks" / file):
        name, sizes = record.get("workload"), [record.get(key, 1) for key in SIZE_FIELDS]
        is_quantized = record.get("args", {}).get("quantization")
        if name not in WORKLOADS or record["model"] != LLAMA_8B or is_quantized or max(sizes) > 1:
            continue
        best[name] = min(record["seconds"], best.get(name, math.inf))
    return best


@functools.cache
def calibrated_pieces() -> Pieces:
    """Return the H200's speeds, ``layer_s`` chosen so that ``single`` comes out as measured."""
    pieces, model = h200_pieces(), read_model(MODELS / LLAMA_8B)
    without = CostModel(model, Layout(), pieces, NO_WIRES).workload_s(WORKLOADS["single"])
    ((_, num_steps),) = WORKLOADS["single"]
    missing = measured_seconds(OURS)["single"] - without
    return dataclasses.replace(pieces, layer_s=missing / num_steps / model.num_layers)


def vllm_pieces() -> Pieces:
    """Return the same for vLLM: ``step_s`` chosen so that its ``single`` on one GPU comes out."""
    ((_, num_steps),) = WORKLOADS["single"]
    slower = measured_seconds(VLLM)["single"] - measured_seconds(OURS)["single"]
    return dataclasses.replace(calibrated_pieces(), step_s=slower / num_steps)


def validate() -> list[Record]:
    """Predict what has been measured, with all versions of the wires."""
    model, one, two = read_model(MODELS / LLAMA_8B), Layout(), Layout(2)
    ours, vllm = calibrated_pieces(), vllm_pieces()
    rows = []

    def add(
        what: str,
        measured_s: float,
        formula: Callable[[CostModel], float],
        layout: Layout,
        pieces: Pieces,
    ) -> None:
        ratios = {
            name: round(formula(CostModel(model, layout, pieces, wires)) / measured_s, 3)
            for name, wires in WIRES.items()
        }
        rows.append({"what": what, "measured_s": measured_s, "ratio": ratios})

    for (num_rows, context), ms in MEASURED_DECODE_MS.items():
        what = f"jaxengine, decode step, {num_rows} rows, context {context}"
        add(what, ms / 1e3, lambda c, r=num_rows, k=context: c.decode_s(r, k), one, ours)
    for prompts, ms in MEASURED_PREFILL_MS.items():
        what = f"jaxengine, prefill step, {prompts} x 2,048 tokens"
        add(what, ms / 1e3, lambda c, n=prompts: c.prefill_s([2048] * n), one, ours)
    for label, file, layout, pieces in (
        ("jaxengine", OURS, one, ours),
        ("vLLM", VLLM, one, vllm),
        ("vLLM TP2", VLLM_TP2, two, vllm),
    ):
        for name, seconds in measured_seconds(file).items():
            what = f"{label}, {name}"
            add(what, seconds, lambda c, w=WORKLOADS[name]: c.workload_s(w), layout, pieces)
    return rows


def print_validation(rows: Sequence[Record]) -> None:
    print("| what | measured | predicted / measured: likely | hopeful to careful |")
    print("|---|---|---|---|")
    for row in rows:
        ratio, ms = row["ratio"], row["measured_s"] * 1e3
        time = f"{ms:,.2f} ms" if ms < 1000 else f"{row['measured_s']:.3f} s"
        low, high = sorted((ratio["hopeful"], ratio["careful"]))
        scope = "" if low == high else f"{low:.2f} to {high:.2f}"
        print(f"| {row['what']} | {time} | {ratio['likely']:.2f} | {scope} |")


def predict_workloads() -> list[Record]:
    """Predict the seconds of whole workloads on one host, to be held against a run there."""
    model, pieces = read_model(MODELS / LLAMA_8B), calibrated_pieces()
    records = []
    for layout in (*(Layout(size) for size in (1, 2, 4, 8)), Layout(1, 2), Layout(1, 1, 2)):
        costs = {name: CostModel(model, layout, pieces, wires) for name, wires in WIRES.items()}
        seconds = {
            workload: {name: cost.workload_s(WORKLOADS[workload]) for name, cost in costs.items()}
            for workload in WORKLOAD_COLUMNS
        }
        records.append({"layout": str(layout), "seconds": seconds})
    return records


def print_workloads(records: Sequence[Record]) -> None:
    print("| layout |", " | ".join(WORKLOAD_COLUMNS), "|")
    print("|---" * (len(WORKLOAD_COLUMNS) + 1) + "|")
    for record in records:
        cells = [record["layout"]]
        for seconds in record["seconds"].values():
            low, likely, high = (
                f"{seconds[name]:.2f}" for name in ("hopeful", "likely", "careful")
            )
            cells.append(likely if low == high else f"{likely} ({low} to {high})")
        print("|", " | ".join(cells), "|")


def predict(
    model: ModelConfig, layouts: Sequence[Layout], num_rows: Sequence[int], context: int, bits: int
) -> list[Record]:
    """Predict decode and prefill of a model on each layout.

    Args:
        model: Its shape.
        layouts: The first one that fits is what efficiency is measured against.
        num_rows: Numbers of requests that decode at the same time, over all replicas.
        context: Tokens of each request.
        bits: Bits of a weight.
    """
    pieces = calibrated_pieces()
    records: list[Record] = []
    for layout in layouts:
        costs = {
            name: CostModel(model, layout, pieces, wires, bits)
            for name, wires in {**WIRES, "none": NO_WIRES}.items()
        }
        likely = costs["likely"]
        kv_tokens = likely.kv_tokens()
        record: Record = {
            "layout": str(layout),
            "num_devices": layout.num_devices,
            "weight_bytes": round(likely.weight_bytes()),
            "kv_tokens": kv_tokens,
        }
        records.append(record)
        if not kv_tokens:
            continue
        record["decode_tok_s"] = {
            rows: {name: round(cost.decode_tok_s(rows, context)) for name, cost in costs.items()}
            for rows in num_rows
            if rows * context <= kv_tokens
        }
        record["prefill_tok_s"] = {
            name: round(cost.prefill_tok_s(*PREFILL)) for name, cost in costs.items()
        }
    return records


def print_predictions(records: Sequence[Record], num_rows: Sequence[int]) -> None:
    """Print the table: likely values, and the range from careful to hopeful."""
    base_rows = BASE_ROWS if BASE_ROWS in num_rows else max(num_rows)
    heads = ["layout", "GPUs", "weights a GPU", "KV tokens"]
    heads += [f"{rows:,} row{'s' if rows > 1 else ''}" for rows in num_rows]
    heads += ["prefill", f"efficiency: {base_rows:,} rows / prefill", "wires"]
    print("|", " | ".join(heads), "|")
    print("|---" * len(heads) + "|")
    base = next((record for record in records if "prefill_tok_s" in record), None)
    for record in records:
        cells = [record["layout"], str(record["num_devices"])]
        cells += [f"{record['weight_bytes'] / 1e9:.1f} GB", f"{record['kv_tokens'] / 1e6:.2f} M"]
        if "prefill_tok_s" not in record:
            print("|", " | ".join([*cells[:3], "does not fit"]), "|" + " |" * (len(heads) - 4))
            continue
        cells += [_cell(record["decode_tok_s"].get(rows)) for rows in num_rows]
        cells += [_cell(record["prefill_tok_s"]), *_efficiency(record, base, base_rows)]
        print("|", " | ".join(cells), "|")


def _cell(tok_s: dict[str, int] | None) -> str:
    if tok_s is None:
        return "-"
    if tok_s["careful"] == tok_s["hopeful"]:
        return f"{tok_s['likely']:,}"
    return f"{tok_s['likely']:,} ({tok_s['careful']:,} to {tok_s['hopeful']:,})"


def _efficiency(record: Record, base: Record, rows: int) -> tuple[str, str]:
    """Speed a GPU against the first layout's, and the share of a decode step that is wires."""

    def each(of: Record, speed: dict[str, int]) -> float:
        return speed["likely"] / of["num_devices"]

    prefill = each(record, record["prefill_tok_s"]) / each(base, base["prefill_tok_s"])
    ours, first = (of["decode_tok_s"].get(rows) for of in (record, base))
    if ours is None or first is None:
        return f"- / {prefill:.0%}", "-"
    decode = each(record, ours) / each(base, first)
    return f"{decode:.0%} / {prefill:.0%}", f"{1 - ours['likely'] / ours['none']:.0%}"
