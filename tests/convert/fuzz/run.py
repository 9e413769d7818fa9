"""Damages checkpoints of every format, and counts what becomes of them.

python -m tests.convert.fuzz.run --cases 2000 --seed 0      a table for people, and the failures
"""

import argparse
import collections
import contextlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.convert.fuzz.corpus import FORMATS
from tests.convert.fuzz.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[3]
SECONDS = (
    60.0  # for one checkpoint of 100 kB, which takes some hundredths: a loaded machine is no hang
)
GOOD = ("same", "clear error")
OUTCOMES = (
    *("same", "clear error", "other weights", "unclear error", "raw exception", "memory"),
    *("hang", "crash"),
)


class Reader:
    """The child process; it is started again when it has hung or died."""

    def __init__(self, original: Path) -> None:
        self.original = original
        self.process: subprocess.Popen[str] | None = None

    def outcome(self, path: Path) -> dict[str, Any]:
        """What becomes of one checkpoint."""
        if self.process is None:
            self._start()
        return self._ask(path, SECONDS)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.convert.fuzz.child"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "RAYON_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        first = self._ask(self.original, 300.0)
        assert first["outcome"] == "same", first

    def _ask(self, path: Path, seconds: float) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which the answer will say
            process.stdin.write(json.dumps({"path": str(path)}) + "\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], seconds)[0]:
            self.close()
            return {"outcome": "hang"}
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.process = None
            return {"outcome": "crash", "text": f"exit status {code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def fuzz(name: str, cases: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Damage one format.

    Args:
        name: A key of ``FORMATS``.
        cases: How many checkpoints.
        seed: Of the first one; the next has the next seed.

    Returns:
        How often each outcome came, and a line for each bad one.
    """
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        original, damaged = Path(folder, "original"), Path(folder, "damaged")
        FORMATS[name](original)
        reader = Reader(original)
        for case in range(seed, seed + cases):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(original, damaged)
            chance = random.Random(f"{name} {case}")
            chance.choice(MUTATIONS[name])(damaged, chance)
            result = reader.outcome(damaged)
            counts[result["outcome"]] += 1
            if result["outcome"] not in GOOD:
                failures.append(f"{name} {case}: {result['outcome']} {result.get('text', '')}")
        reader.close()
    return counts, failures


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    options = parser.parse_args()
    print(f"| format | {' | '.join(OUTCOMES)} | s |\n|---|{'---|' * (len(OUTCOMES) + 1)}")
    all_failures = []
    for name in options.formats:
        start = time.perf_counter()
        counts, failures = fuzz(name, options.cases, options.seed)
        numbers = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        print(f"| {name} | {numbers} | {time.perf_counter() - start:.0f} |", flush=True)
        all_failures += failures
    print("\n".join(all_failures))
    return 1 if all_failures else 0


if __name__ == "__main__":
    sys.exit(main())
