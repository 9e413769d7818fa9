"""Tuning bench of ragged prefill attention: variants of the kernels against cuDNN's dense kernel.

Rows of several lengths attend through shuffled block tables; each variant is checked against
float32 attention, then timed over several layers in one jitted program. Prints a line a variant,
then a table, and one JSON line last. A variant that fails is reported and skipped.

    python -m benchmarks.ragged_sweep [--cases 8x2048,2x8192] [--only mosaic]
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.ragged_attention_mosaic import (
    RaggedMosaicConfig,
    ragged_attention_mosaic,
)
from jaxengine.pallas_kernels.ragged_attention_triton import (
    RaggedTritonConfig,
    ragged_attention_triton,
)
from jaxengine.pallas_kernels.target import Target

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
NUM_LAYERS = 4
REPETITIONS = 6

SHORT = [
    (int(n), int(n) + int(m))
    for n, m in np.random.default_rng(0).integers((16, 0), (500, 1500), (64, 2))
]
CASES: dict[str, list[tuple[int, int]]] = {  # rows of (query tokens, KV length)
    "8x2048": [(2048, 2048)] * 8,
    "2x8192": [(8192, 8192)] * 2,
    "chunk 2048 on 6144": [(2048, 8192)],
    "64 ragged rows": SHORT,
}
SWEPT_CASES = ("8x2048", "2x8192")  # others run the default variants only


class Variant(NamedTuple):
    """A kernel with its options."""

    name: str
    attention: Callable[..., jax.Array]
    config: Any
    block_size: int = 16
    is_default: bool = False


def mosaic(block_size: int = 16, is_default: bool = False, **options: Any) -> Variant:
    config = RaggedMosaicConfig(**{"tile_kv": 128, "num_stages": 2, "take_turns": True, **options})
    name = " ".join(f"{key}={value}" for key, value in options.items())
    name = f"mosaic block={block_size} {name}"
    return Variant(name, ragged_attention_mosaic, config, block_size, is_default)


def triton(
    rows: int,
    tile_kv: int,
    num_warps: int,
    num_stages: int,
    block_size: int = 16,
    is_default: bool = False,
) -> Variant:
    config = RaggedTritonConfig(rows, tile_kv, num_warps, num_stages)
    name = f"triton block={block_size} {rows}x{tile_kv} warps={num_warps} stages={num_stages}"
    return Variant(name, ragged_attention_triton, config, block_size, is_default)


VARIANTS = [
    triton(128, 64, 8, 3, is_default=True),
    mosaic(is_default=True),
    mosaic(take_turns=False),
    mosaic(tile_kv=64, num_stages=4),
    mosaic(tile_kv=64, num_stages=4, take_turns=False),
    mosaic(num_programs=1 << 20),  # one item a program: scheduled by the hardware
    mosaic(block_size=32),
    mosaic(block_size=64),
    mosaic(block_size=128),
    triton(128, 64, 8, 2),
    triton(128, 128, 8, 2),
    triton(64, 64, 4, 3),
    triton(128, 64, 4, 3),
    triton(128, 64, 8, 3, block_size=64),
]


class Batch(NamedTuple):
    """The operands of the kernels, for every layer the same but for q."""

    rows: list[tuple[int, int]]
    q: list[jax.Array]
    operands: tuple[jax.Array, ...]


def make_batch(rows: list[tuple[int, int]], block_size: int) -> Batch:
    rng = np.random.default_rng(1)
    query_lens, seq_lens = np.array(rows).T
    num_blocks = -(-seq_lens // block_size)
    ids = 1 + rng.permutation(num_blocks.sum())
    tables = np.zeros((len(rows), num_blocks.max()), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(num_blocks), num_blocks, strict=True)):
        tables[row, :count] = ids[end - count : end]
    num_tokens = -(-query_lens.sum() // 64) * 64
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    cache_shape = (int(num_blocks.sum()) + 1, NUM_KV_HEADS, block_size, HEAD_DIM)
    k, v = (normal(jax.random.key(i), cache_shape, jnp.bfloat16) for i in range(2))
    q_shape = (int(num_tokens), NUM_HEADS, HEAD_DIM)
    q = [normal(jax.random.key(2 + i), q_shape, jnp.bfloat16) for i in range(NUM_LAYERS)]
    starts = np.cumsum([0, *query_lens])
    integers = (jnp.asarray(x, jnp.int32) for x in (tables, seq_lens, starts, 0))
    return Batch(rows, q, (k, v, *integers))


@functools.partial(jax.jit, static_argnums=(3, 4))
def reference_row(
    q: jax.Array, cached: tuple[jax.Array, jax.Array], lengths: jax.Array, max_q: int, max_kv: int
) -> jax.Array:
    """Attend in float32 from the queries [max_q, N, H] of one row, one KV head after the other."""
    query_len, seq_len = lengths
    position = seq_len - query_len + jnp.arange(max_q)
    visible = jnp.arange(max_kv)[None, :] <= position[:, None]

    def one_head(operands: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = (x.astype(jnp.float32) for x in operands)
        scores = jnp.einsum("QGH,SH->GQS", q, k, precision="highest") * SCALE
        p = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.einsum("GQS,SH->QGH", p, v, precision="highest")

    grouped = q.reshape(max_q, NUM_KV_HEADS, -1, HEAD_DIM).swapaxes(0, 1)
    k, v = (x.swapaxes(0, 1).reshape(NUM_KV_HEADS, -1, HEAD_DIM)[:, :max_kv] for x in cached)
    return jax.lax.map(one_head, (grouped, k, v)).swapaxes(0, 1).reshape(q.shape)


def reference(batch: Batch, row: int) -> jax.Array:
    """Return the float32 output of one row, [query_len, N, H]."""
    k, v, tables, _, starts, _ = batch.operands
    query_len, seq_len = batch.rows[row]
    max_q = max(query for query, _ in batch.rows)
    max_kv = tables.shape[1] * k.shape[2]
    start = int(starts[row])
    q = jnp.pad(batch.q[0][start : start + query_len], ((0, max_q - query_len), (0, 0), (0, 0)))
    lengths = jnp.array([query_len, seq_len])
    return reference_row(q, (k[tables[row]], v[tables[row]]), lengths, max_q, max_kv)[:query_len]


def largest_error(batch: Batch, out: jax.Array, expected: dict[int, jax.Array]) -> float:
    errors = []
    for row, want in expected.items():
        start = int(batch.operands[4][row])
        got = out[start : start + want.shape[0]].astype(jnp.float32)
        errors.append(float(jnp.max(jnp.abs(got - want))))
    padding = out[int(batch.operands[4][-1]) :].astype(jnp.float32)
    errors.append(float(jnp.max(jnp.abs(padding), initial=0.0)))
    return float(np.max(errors))  # a NaN anywhere is the result


def seconds_a_layer(program: Callable[..., Any], *arrays: Any) -> float:
    jax.block_until_ready(program(*arrays))
    best = float("inf")
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        for _ in range(2):
            out = program(*arrays)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / 2)
    return best / NUM_LAYERS


def tera_flop(rows: list[tuple[int, int]]) -> float:
    pairs = sum(query * (length - query) + query * (query + 1) / 2 for query, length in rows)
    return 4 * HEAD_DIM * NUM_HEADS * pairs / 1e12


def run_variant(batch: Batch, variant: Variant, expected: dict[int, jax.Array]) -> dict[str, Any]:
    def layers(q: list[jax.Array], *operands: jax.Array) -> list[jax.Array]:
        how = {"options": AttentionOptions(SCALE), "target": Target.of(jax.devices()[0])}
        return [variant.attention(one, *operands, **how, config=variant.config) for one in q]

    program = jax.jit(layers)
    start = time.perf_counter()
    out = jax.block_until_ready(program(batch.q, *batch.operands))
    compile_s = time.perf_counter() - start
    error = largest_error(batch, out[0], expected)
    if not error < 0.03:
        raise ArithmeticError(f"largest error {error:.3g}")
    seconds = seconds_a_layer(program, batch.q, *batch.operands)
    return {
        "us": seconds * 1e6,
        "tflop_s": tera_flop(batch.rows) / seconds,
        "error": error,
        "compile_s": compile_s,
    }


def run_cudnn(rows: list[tuple[int, int]]) -> dict[str, Any]:
    length = rows[0][0]
    shape = (len(rows), length)
    keys = jax.random.split(jax.random.key(0), NUM_LAYERS + 2)
    k, v = (
        jax.random.normal(key, (*shape, NUM_KV_HEADS, HEAD_DIM), jnp.bfloat16) for key in keys[:2]
    )
    q = [jax.random.normal(key, (*shape, NUM_HEADS, HEAD_DIM), jnp.bfloat16) for key in keys[2:]]
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, scale=SCALE, implementation="cudnn"
    )
    program = jax.jit(lambda q, k, v: [attention(one, k, v) for one in q])
    seconds = seconds_a_layer(program, q, k, v)
    return {"us": seconds * 1e6, "tflop_s": tera_flop(rows) / seconds}


def run_case(name: str, only: str, deadline: float) -> list[dict[str, Any]]:
    rows = CASES[name]
    results = []

    def record(variant: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            result = {"case": name, "variant": variant, **run()}
        except Exception as error:  # one bad variant must not end the sweep
            result = {"case": name, "variant": variant, "failed": f"{error!r}"[:300]}
        results.append(result)
        print(json.dumps(result), flush=True)

    if len(set(rows)) == 1 and rows[0][0] == rows[0][1]:
        record("cudnn dense", lambda: run_cudnn(rows))
    checked = range(len(rows)) if len(rows) > 8 else {0, len(rows) - 1}
    batches: dict[int, tuple[Batch, dict[int, jax.Array]]] = {}
    for variant in VARIANTS:
        is_skipped = only not in variant.name or time.perf_counter() > deadline
        if is_skipped or (name not in SWEPT_CASES and not variant.is_default):
            continue
        if variant.block_size not in batches:
            batch = make_batch(rows, variant.block_size)
            batches = {variant.block_size: (batch, {r: reference(batch, r) for r in checked})}
        batch, expected = batches[variant.block_size]
        record(variant.name, functools.partial(run_variant, batch, variant, expected))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--only", default="", help="run the variants whose name contains this")
    parser.add_argument("--budget-s", type=float, default=210, help="start no variant after this")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.budget_s
    print(jax.__version__, jax.devices(), flush=True)
    results = [r for name in args.cases.split(",") for r in run_case(name, args.only, deadline)]
    print(f"{'case':20} {'variant':48} {'us':>9} {'TFLOP/s':>8} {'error':>8} {'first s':>8}")
    for r in results:
        head = f"{r['case']:20} {r['variant']:48}"
        if "failed" in r:
            print(f"{head} FAIL {r['failed'][:120]}")
        else:
            error, compile_s = r.get("error", float("nan")), r.get("compile_s", float("nan"))
            print(f"{head} {r['us']:9.1f} {r['tflop_s']:8.1f} {error:8.1e} {compile_s:8.1f}")
    print(json.dumps({"device": jax.devices()[0].device_kind, "results": results}))


if __name__ == "__main__":
    main()
