"""Numbers of a benchmark, as a table for people and as JSON under vLLM's names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PERCENTILES = (99.0,)


def statistics(
    name: str, seconds: Sequence[float], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, float]:
    """Return mean, median, standard deviation and percentiles in milliseconds.

    Args:
        name: Such as "ttft": the keys are "mean_ttft_ms", "p99_ttft_ms", ...
        seconds: What was measured; with none of it there are no keys.
        percentiles: Which ones, from 0 to 100.
    """
    if not len(seconds):
        return {}
    values = np.asarray(seconds, float) * 1e3
    found = {
        f"mean_{name}_ms": values.mean(),
        f"median_{name}_ms": np.median(values),
        f"std_{name}_ms": values.std(),
    }
    found |= {f"p{each:g}_{name}_ms": np.percentile(values, each) for each in percentiles}
    return {key: round(float(value), 4) for key, value in found.items()}


def print_report(title: str, lines: Mapping[str, Any]) -> None:
    """Print a title and a line for each entry."""
    print(f"{f' {title} ':=^60}")
    for name, value in lines.items():
        print(f"{name:<42}{f'{value:.2f}' if isinstance(value, float) else value!s:>18}")
    print("=" * 60, flush=True)


def write_json(record: Mapping[str, Any], file: Path | None) -> None:
    """Write a record as one JSON object, if there is a file for it.

    Raises:
        ValueError: If it cannot be written.
    """
    if file is None:
        return
    try:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output-json {str(file)!r}: {error.strerror}") from None
