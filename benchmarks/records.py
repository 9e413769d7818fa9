"""What the benchmarks share: records and where they go, models, percentiles, other programs.

A record is one JSON object: a line of ``benchmarks/results/<device>.jsonl``.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxengine.model_config import ModelConfig

ROOT = Path(__file__).parent.parent

Record = dict[str, Any]


class ChildError(RuntimeError):
    """A child process that failed; the message is the last line of what it complained about."""


def run_record(model: str | Path, dtype: str, workload: str) -> Record:
    """Return the fields that every record begins with. Touches the devices."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": Path(model).name,
        "dtype": dtype,
        "workload": workload,
    }


def read_model(directory: str | Path) -> ModelConfig:
    """Return what a directory's config.json says, in bfloat16."""
    hf_config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return ModelConfig.from_hf(hf_config, "bfloat16")


def commit() -> str:
    """Return the short hash of the source tree's commit."""
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return run.stdout.strip() or "unknown"


def publish(records: Sequence[Record], output: Path | None) -> None:
    """Print each record as a line of JSON, and append them to a file if there is one."""
    print("\n".join(map(json.dumps, records)), flush=True)
    append(records, output)


def append(records: Sequence[Record], output: Path | None) -> None:
    """Append each record as a line of JSON to a file, if there is one."""
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, p90 and p99 of some values, each times ``scale``."""
    median, p90, p99 = np.percentile(np.asarray(values, float) * scale, (50, 90, 99)).tolist()
    return {"median": round(median, 4), "p90": round(p90, 4), "p99": round(p99, 4)}


def run_child(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[Record]:
    """Run ``python <arguments>`` and return the JSON lines that it printed.

    Args:
        arguments: Of the interpreter, such as ``["-m", "benchmarks.throughput", ...]``.
        environment: Variables to set beside those of this process.

    Raises:
        ChildError: If it failed.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(part for part in paths if part)
    run = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    )
    if run.returncode != 0:
        raise ChildError(last_complaint(run.stderr) or f"exit status {run.returncode}")
    return json_lines(run.stdout)


def last_complaint(stderr: str) -> str:
    """Return the last line that names an exception, else the last line of all."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or [""])[-1]


def json_lines(text: str) -> list[Record]:
    """Return the objects among the lines of a text."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
