"""Time the matrix products of a model's step, next to what memory and tensor cores give.

    python -m benchmarks.products --model benchmarks/models/llama-3.1-8b
    python -m benchmarks.products --tiny    # seconds on a CPU, to try the script

Each shape is timed with XLA's own choice of kernel ("XLA"), with cuBLASLt only, and for few rows
with our kernels ("ours"), which leave sums of splits to the next kernel and, behind gate and up,
have the activation in them; the output projection is XLA's there too. Weights and rows
are random, as tensor cores run faster on constant numbers, and every product of a run has a weight
of its own, so that the L2 cache does not answer for the memory. The floor of a product is the
larger of its bytes at the read rate and its arithmetic at the product rate. Prints a table, for
each number of rows the sum over a step, and last one JSON line.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxengine.pallas_kernels.gated_product import gated_product
from jaxengine.pallas_kernels.split_product import project, split_product
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from tqdm import tqdm

from benchmarks.device_rates import SHORT_S, device_rates, seconds_per_run
from benchmarks.records import ROOT, Record, publish, read_model, run_record
from jaxengine.model_config import ModelConfig

ROWS = (8, 32, 64, 128, 256, 512, 1024, 16384)
MIN_WEIGHT_BYTES = 512 << 20  # of the weights of one run; an H200's L2 cache holds 60 MB
MAX_PRODUCTS = 32
VARIANTS: dict[str, dict[str, bool]] = {
    "XLA": {},
    "cuBLASLt": {"xla_gpu_enable_triton_gemm": False},
    "ours": {},
}
Product = Callable[[jax.Array, jax.Array], jax.Array]  # of rows [T, in] and a weight [out, in]


def layer_products(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return out and in of a decoder layer's four products and of the output projection."""
    heads = model.num_heads * model.head_dim
    keys_and_values = 2 * model.num_kv_heads * model.head_dim
    return {
        "qkv": (heads + keys_and_values, model.hidden_size),
        "o": (model.hidden_size, heads),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
        "logits": (model.vocab_size, model.hidden_size),
    }


def our_product(name: str, num_rows: int) -> Product | None:
    """The kernel that a GPU's step has for a product of a layer; None if it takes XLA's."""
    target = Target.of(jax.devices()[0])
    if not target.is_gpu or num_rows > FEW_ROWS or name == "logits":
        return None
    if name != "gate_up":
        return functools.partial(split_product, target=target, implementation="triton")

    def gate_up(rows: jax.Array, weight: jax.Array) -> jax.Array:
        halves = weight.reshape(2, -1, weight.shape[1])
        return gated_product(
            rows, halves, activation="silu", target=target, implementation="triton"
        )

    return gate_up


def time_product(
    num_rows: int,
    shape: tuple[int, int],
    options: dict[str, str | bool],
    repeat_s: float = SHORT_S,
    product: Product = project,
) -> float:
    """Return the seconds of ``[rows, in] @ [out, in]^T`` in bf16, many in one program."""
    num_out, num_in = shape
    weight_bytes = 2 * num_out * num_in
    count = max(2, min(MAX_PRODUCTS, MIN_WEIGHT_BYTES // weight_bytes))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), count)
    weights = [draw(key, shape, jnp.bfloat16) for key in keys]
    rows = draw(jax.random.key(1), (num_rows, num_in), jnp.bfloat16)

    def run(rows: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        outputs = []
        for weight in weights:
            # The barrier keeps XLA from joining products of the same rows into one.
            rows, weight = jax.lax.optimization_barrier((rows, weight))
            outputs.append(product(rows, weight))
        return outputs

    is_gpu = jax.default_backend() == "gpu"
    program = jax.jit(run).lower(rows, weights).compile(options if is_gpu else {})
    return seconds_per_run(program, rows, weights, goal_s=repeat_s) / count


def time_products(
    model: ModelConfig, row_counts: Sequence[int], rates: dict[str, float], repeat_s: float
) -> Iterator[Record]:
    """Yield a record for each number of rows, product and variant."""
    products = layer_products(model)
    with tqdm(total=len(row_counts) * len(products) * len(VARIANTS), desc="products") as bar:
        for num_rows in row_counts:
            for name, (num_out, num_in) in products.items():
                # Only rows that sample need logits: a long step has as many as max_num_seqs.
                used_rows = min(num_rows, 1024) if name == "logits" else num_rows
                num_bytes = 2 * (num_out * num_in + used_rows * (num_out + num_in))
                flops = 2 * used_rows * num_out * num_in
                floor = max(
                    num_bytes / rates["memory_gb_s"] / 1e9, flops / rates["dot_tflop_s"] / 1e12
                )
                for variant, options in VARIANTS.items():
                    bar.update()
                    product = our_product(name, used_rows) if variant == "ours" else project
                    if product is None:
                        continue
                    seconds = time_product(used_rows, (num_out, num_in), options, repeat_s, product)
                    yield {
                        "rows": num_rows,
                        "product": name,
                        "variant": variant,
                        "us": round(seconds * 1e6, 2),
                        "gb_s": round(num_bytes / seconds / 1e9, 1),
                        "tflop_s": round(flops / seconds / 1e12, 2),
                        "floor_us": round(floor * 1e6, 2),
                    }


def step_sums(model: ModelConfig, records: list[Record]) -> list[Record]:
    """Add up the products of a step, all layers and the logits, for each number of rows."""
    sums = []
    for num_rows in sorted({record["rows"] for record in records}):
        of_rows = [record for record in records if record["rows"] == num_rows]
        for variant in VARIANTS:
            own = {r["product"]: r for r in of_rows if r["variant"] == variant}
            if not own:
                continue
            chosen = [own.get(r["product"], r) for r in of_rows if r["variant"] == "XLA"]
            counts = [1 if r["product"] == "logits" else model.num_layers for r in chosen]
            ms, floor_ms = (
                sum(n * r[key] for n, r in zip(counts, chosen, strict=True)) / 1e3
                for key in ("us", "floor_us")
            )
            sums.append(
                {
                    "rows": num_rows,
                    "variant": variant,
                    "ms": round(ms, 3),
                    "floor_ms": round(floor_ms, 3),
                }
            )
    return sums


def measure(
    model: ModelConfig, rates: dict[str, float], row_counts: Sequence[int], repeat_s: float
) -> dict[str, Any]:
    """Time the products of a model's steps, print the tables and return what they show."""
    records = []
    for record in time_products(model, row_counts, rates, repeat_s):
        tqdm.write(
            f"{record['rows']:6} rows {record['product']:8} {record['variant']:9}"
            f"{record['us']:10.1f} us {record['gb_s']:7,.0f} GB/s {record['tflop_s']:7.1f} TFLOP/s "
            f"{record['floor_us'] / record['us']:6.1%} of the floor's speed"
        )
        records.append(record)
    sums = step_sums(model, records)
    for each in sums:
        print(
            f"a step of {each['rows']:6} rows, {each['variant']:9}{each['ms']:9.2f} ms, "
            f"floor {each['floor_ms']:.2f} ms"
        )
    return {"products": records, "steps": sums}


def parse_args(description: str, rows: Sequence[int], tiny_rows: Sequence[int]) -> Any:
    """Read the command line of a benchmark of products.

    Returns:
        Its arguments; with ``--tiny`` the model and the rows are replaced by small ones.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks/models/llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument(
        "--repeat-s",
        type=float,
        default=SHORT_S,
        help="seconds of a repetition, 2 to reach the power limit",
    )
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU runs in seconds")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.rows = ROOT / "benchmarks/models/tiny-llama", tiny_rows
    return args


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], ROWS, tiny_rows=(4, 16))
    model = read_model(args.model)
    rates = device_rates(args.tiny)
    record = run_record(args.model, model.dtype, "products") | rates
    measured = measure(model, rates, args.rows, args.repeat_s)
    publish([record | {"repeat_s": args.repeat_s} | measured], args.output)


if __name__ == "__main__":
    main()
