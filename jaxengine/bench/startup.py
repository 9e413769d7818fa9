"""Seconds from the start of a process to the first token, part by part.

    python -m jaxengine.bench.startup   # one start; reads what to start as JSON

The parts follow each other: "python" until the first line of the program, "imports" of jaxengine
and jax, "plan" (config, tokenizer, devices, memory), "compile" of the step programs, "weights", and
"tokens", the first request. Several programs compile at a time, so theirs add up to more.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
HIT_EVENT = "/jax/compilation_cache/cache_hits"


def measure_start(
    model: str, engine_args: Mapping[str, Any], *, input_len: int, began: float, entered: float
) -> dict[str, Any]:
    """Start the engine in this process, which has not loaded jax, and return what it takes.

    Args:
        model: As for ``LLM``.
        engine_args: Likewise.
        input_len: Tokens of the first prompt.
        began: ``time.time`` when the process was started.
        entered: ``time.time`` at its first line.

    Returns:
        "seconds", "parts", "num_programs" that XLA was asked for, "num_cache_hits" among them,
        "step_programs" and "programs" with their seconds, "dtype".
    """
    import jax

    from jaxengine import LLM, SamplingParams

    programs: list[tuple[str, float]] = []
    hits: list[str] = []

    def on_duration(event: str, duration_secs: float, **labels: str | int) -> None:
        if event == COMPILE_EVENT:
            programs.append((str(labels.get("fun_name", "")), round(duration_secs, 3)))

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event == HIT_EVENT else None
    )
    imported = time.time()
    llm = LLM(model, **engine_args)
    ready = time.time()
    prompt = [token % llm.startup.model.vocab_size for token in range(input_len)]
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    done = time.time()
    startup = llm.startup
    parts = {
        "python": entered - began,
        "imports": imported - entered,
        "plan": ready - imported - startup.compile_s - startup.load_s,
        "compile": startup.compile_s,
        "weights": startup.load_s,
        "tokens": done - ready,
    }
    return {
        "seconds": round(done - began, 3),
        "parts": {name: round(seconds, 3) for name, seconds in parts.items()},
        "num_programs": len(programs),
        "num_cache_hits": len(hits),
        "step_programs": {
            f"{shape.num_tokens} tokens, {shape.num_rows} rows": round(seconds, 3)
            for shape, seconds in startup.compile_seconds.items()
        },
        "programs": sorted(programs, key=lambda program: -program[1]),
        "dtype": startup.model.dtype,
    }


def start_once(
    model: str, engine_args: Mapping[str, Any], cache: str, input_len: int = 8
) -> dict[str, Any]:
    """Start the engine once, in a process of its own, and return what ``measure_start`` does.

    Args:
        model: As for ``LLM``.
        engine_args: Likewise.
        cache: Directory of compiled programs; an empty one makes the start a cold one.
        input_len: Tokens of the first prompt.

    Raises:
        ValueError: If the engine cannot start.
    """
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    told = {"model": model, "engine_args": dict(engine_args), "input_len": input_len}
    run = subprocess.run(
        [sys.executable, "-m", "jaxengine.bench.startup"],
        input=json.dumps({**told, "began": time.time()}),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    lines = run.stdout.splitlines()
    if run.returncode != 0 or not lines:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise ValueError(f"the engine cannot start: {last}")
    record: dict[str, Any] = json.loads(lines[-1])
    return record


if __name__ == "__main__":
    _entered = time.time()
    _told = json.load(sys.stdin)
    print(json.dumps(measure_start(**_told, entered=_entered)))
