"""What a device gives: memory bandwidth, bf16 products, and all-reduces over several devices.

    python -m benchmarks.device_rates
    python -m benchmarks.device_rates --tiny    # seconds on a CPU, to try the script

The bandwidth that counts is the best of several ways to move bytes. One way is not enough: adding 1
to 2 GiB of bf16 gave 3,314 GB/s on an H200, whose decode kernel reads 4,100, and 2,950 on an H100,
hardly less although its memory is 0.7 times as fast. So the memory is not what limited it. Judged,
not measured: XLA gives each thread of such a kernel four numbers, 8 bytes of bf16, and both cards
have as many threads, so the loads in flight do. Reading and writing in turns costs memory time
besides, and a decode step reads. Hence wider loads (float32), a plain copy, reductions that only
read, and a product with 8 rows, which reads a weight as a decode step does. Arrays are far larger
than the L2 cache. Prints a table, and last one JSON line.
"""

import argparse
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from benchmarks.records import Record, commit, publish

MIB = 1 << 20
HIDDEN = 4096
MAX_RUNS = 4000
SHORT_S = 0.03  # too short to warm a GPU up; 1 to 2 s show what its power limit leaves
ALL_REDUCES_A_RUN = 16

Mover = tuple[str, str, Callable[[jax.Array], jax.Array]]  # kind, name, function of [rows, 8192]

# A copy counts its bytes twice, read and written; a read counts them once.
MOVERS: list[Mover] = [
    ("copy", "copy", jnp.copy),
    ("copy", "add 1", lambda x: x + 1),
    ("read", "sum of rows", lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)),
    ("read", "maximum", jnp.max),
    ("read", "product, 8 rows", lambda x: x[:8] @ x.T),
]


def seconds_per_run(function: Callable[..., Any], *args: Any, goal_s: float = SHORT_S) -> float:
    """Best of four repetitions of as many runs as take ``goal_s``; compiles and warms up first."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    runs = max(1, min(MAX_RUNS, int(goal_s / (time.perf_counter() - start))))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(runs):
            out = function(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / runs)
    return best


def memory_rates(tiny: bool, show_progress: bool = False) -> list[Record]:
    """Time every mover on every size and type.

    Returns:
        Records of kind, name, dtype, bytes and GB/s.
    """
    sizes = [MIB] if tiny else [1024 * MIB, 2048 * MIB, 4096 * MIB]
    cases = [(size, dtype) for size in sizes for dtype in ("bfloat16", "float32")]
    records = []
    with tqdm(total=len(cases) * len(MOVERS), desc="memory", disable=not show_progress) as bar:
        for size, dtype in cases:
            x = jnp.ones((size // jnp.dtype(dtype).itemsize // 8192, 8192), dtype)
            for kind, name, mover in MOVERS:
                seconds = seconds_per_run(jax.jit(mover), x)
                moved = x.nbytes * (2 if kind == "copy" else 1)
                record = {"kind": kind, "name": name, "dtype": dtype, "bytes": size}
                records.append(record | {"gb_s": round(moved / seconds / 1e9, 1)})
                bar.update()
    return records


def best_rate(records: list[Record], kind: str) -> float:
    """Return the highest GB/s of a kind."""
    return max(record["gb_s"] for record in records if record["kind"] == kind)


def product_tflop_s(tiny: bool) -> float:
    """Return the rate of a large bf16 product of random numbers, which cost more than constants."""
    n = 256 if tiny else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    return 2 * n**3 / seconds_per_run(jax.jit(lambda a: a @ a), a) / 1e12


def device_rates(tiny: bool) -> dict[str, float]:
    """Return copy, read and product rate; ``memory_gb_s`` is the better of copy and read."""
    records = memory_rates(tiny)
    copy, read = best_rate(records, "copy"), best_rate(records, "read")
    return {
        "copy_gb_s": copy,
        "read_gb_s": read,
        "memory_gb_s": max(copy, read),
        "dot_tflop_s": product_tflop_s(tiny),
    }


def chain(num_sums: int, mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Return a program of a run's additions, the first ``num_sums`` of them summed over devices.

    The shards differ before each sum: XLA would replace a sum of equal ones by a multiplication.
    """
    size = mesh.devices.size

    def run(x: jax.Array) -> jax.Array:
        here = jax.lax.axis_index("tp").astype(x.dtype)
        for number in range(ALL_REDUCES_A_RUN):
            x = x + here
            if number < num_sums:
                x = jax.lax.psum(x, "tp") / size
        return x

    shards = P("tp", None)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=shards, out_specs=shards))


def all_reduces(tiny: bool) -> Iterator[Record]:
    """Time sums over all devices, as a tensor-parallel layer does them: [rows, 4096] in bf16.

    Many follow each other in one program, and the time of the same program without them is taken
    off, so that neither its launch nor its additions count.
    """
    size = len(jax.devices())
    mesh = Mesh(np.asarray(jax.devices()), ("tp",))
    with_sums, without = chain(ALL_REDUCES_A_RUN, mesh), chain(0, mesh)
    for rows in (1, 8) if tiny else (1, 8, 32, 128, 512, 2048, 16384):
        x = jax.device_put(
            np.ones((rows * size, HIDDEN), jnp.bfloat16), NamedSharding(mesh, P("tp", None))
        )
        seconds = (seconds_per_run(with_sums, x) - seconds_per_run(without, x)) / ALL_REDUCES_A_RUN
        num_bytes = x.nbytes // size
        share = 2 * (size - 1) / size
        yield {
            "rows": rows,
            "bytes": num_bytes,
            "us": round(seconds * 1e6, 2),
            "bus_gb_s": round(share * num_bytes / seconds / 1e9, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    args = parser.parse_args()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    memory = memory_rates(args.tiny, show_progress=True)
    for each in memory:
        size = f"{each['bytes'] / MIB:,.0f} MiB"
        how = f"{each['kind']:5} {each['name']:16} {each['dtype']:9}"
        print(f"{how} {size:>10} {each['gb_s']:8,.0f} GB/s")
    record = {
        "benchmark": "device_rates",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "jax": jax.__version__,
        "copy_gb_s": best_rate(memory, "copy"),
        "read_gb_s": best_rate(memory, "read"),
        "dot_tflop_s": round(product_tflop_s(args.tiny), 2),
        "memory": memory,
        "all_reduce": [],
    }
    print(
        f"best copy {record['copy_gb_s']:,.0f} GB/s, best read {record['read_gb_s']:,.0f} GB/s, "
        f"products {record['dot_tflop_s']:,.1f} TFLOP/s"
    )
    if len(devices) > 1:
        for each in all_reduces(args.tiny):
            speed = f"{each['us']:10.1f} us {each['bus_gb_s']:8.1f} GB/s"
            print(f"all-reduce of {each['bytes']:12,} bytes {speed}")
            record["all_reduce"].append(each)
    publish([record], args.output)


if __name__ == "__main__":
    main()
