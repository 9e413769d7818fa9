"""Tuning bench of the gated product: configurations of the Mosaic kernel against XLA's two kernels.

    python -m benchmarks.gated_sweep --model benchmarks/models/llama-3.1-8b --rows 16384 1024
    python -m benchmarks.gated_sweep --tiny    # seconds on a CPU, to try the script

Weights and rows are random, and each product of a run has a weight of its own. Every variant is
compared with float32. A variant that fails is reported and skipped. All programs are compiled
first, several at a time. Prints a line a variant and last one JSON line.
"""

import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxengine.pallas_kernels.gated_product_mosaic import GatedProductConfig, gated_product_mosaic
from jaxengine.pallas_kernels.gated_product_reference import gated_product_reference
from jaxengine.pallas_kernels.target import Target
from tqdm import tqdm

from benchmarks.device_rates import seconds_per_run
from benchmarks.products import parse_args
from benchmarks.records import Record, publish, read_model, run_record
from jaxengine.engine.device.compiler_options import compiler_options

NUM_WEIGHTS = 4
CHECKED_ROWS = 256
ERROR_LIMIT = 1e-2
CONFIGS = [
    GatedProductConfig(),
    GatedProductConfig(cluster=2),
    GatedProductConfig(cluster=2, lag=1),
    GatedProductConfig(cluster=2, lag=3, tile_k=32, num_stages=8),
]

Product = Callable[[jax.Array, jax.Array], jax.Array]


def variants() -> dict[str, Product]:
    """Return the functions to compare, by what their lines call them."""
    named: dict[str, Product] = {
        "XLA": functools.partial(gated_product_reference, activation="silu")
    }
    for config in CONFIGS:
        values = dataclasses.asdict(config).items()
        name = "mosaic " + " ".join(f"{key}={value}" for key, value in values)
        num_sms = Target.of(jax.devices()[0]).num_sms
        named[name] = functools.partial(gated_product_mosaic, num_sms=num_sms, config=config)
    return named


def compiled(product: Product, x: jax.Array, weights: list[jax.Array]) -> Any:
    """Return a program of one product for each weight, or the error that it ends in."""

    def run(x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        outputs = []
        for weight in weights:
            # The barrier keeps XLA from joining products of the same rows into one.
            x, weight = jax.lax.optimization_barrier((x, weight))
            outputs.append(product(x, weight))
        return outputs

    try:
        return (
            jax.jit(run)
            .lower(x, weights)
            .compile(compiler_options(jax.default_backend(), x.shape[0]))
        )
    except Exception as error:
        return error


def time_variant(program: Any, x: jax.Array, weights: list[jax.Array], repeat_s: float) -> Record:
    """Return a variant's microseconds and error, or why there are none."""
    if isinstance(program, Exception):
        return {"failure": f"{type(program).__name__}: {program}"[:300]}
    some = slice(None, None, max(1, len(x) // CHECKED_ROWS))
    found, again = (np.asarray(program(x, weights)[-1][some], np.float32) for _ in range(2))
    wide = x[some].astype(jnp.float32), weights[-1].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(gated_product_reference(*wide, activation="silu"))
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error < ERROR_LIMIT or (found != again).any():
        return {"failure": f"differs from float32 by {error:.1e}, or between two runs"}
    seconds = seconds_per_run(program, x, weights, goal_s=repeat_s) / len(weights)
    flops = 2 * x.size * 2 * weights[0].shape[1]
    return {
        "us": round(seconds * 1e6, 1),
        "tflop_s": round(flops / seconds / 1e12, 1),
        "error": round(error, 6),
    }


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], (16384, 4096, 1024, 256), tiny_rows=(256,))
    model = read_model(args.model)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), NUM_WEIGHTS + 1)
    shape = (2, model.intermediate_size, model.hidden_size)
    weights = [draw(key, shape, jnp.bfloat16) * model.hidden_size**-0.5 for key in keys[1:]]
    rows = {n: draw(keys[0], (n, model.hidden_size), jnp.bfloat16) for n in args.rows}
    cases = [(n, name, product) for n in args.rows for name, product in variants().items()]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(compiled, product, rows[n], weights) for n, _, product in cases]
        programs = [future.result() for future in tqdm(futures, desc="compiling")]
    results = []
    for (num_rows, name, _), program in zip(cases, programs, strict=True):
        result = time_variant(program, rows[num_rows], weights, args.repeat_s)
        results.append({"rows": num_rows, "variant": name} | result)
        print(f"{num_rows:6} rows {name:60} " + json.dumps(result), flush=True)
    record = run_record(args.model, model.dtype, "gated product")
    publish([record | {"repeat_s": args.repeat_s, "variants": results}], args.output)


if __name__ == "__main__":
    main()
