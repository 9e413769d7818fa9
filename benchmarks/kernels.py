"""Time the attention kernels on this device, next to what its memory and tensor cores give.

    python -m benchmarks.kernels                      # shipped configurations, decode and ragged
    python -m benchmarks.kernels --sweep              # tile sizes too
    python -m benchmarks.kernels --tiny               # seconds on a CPU, to try the script

Every call of a timed run reads other cache blocks, so the L2 cache does not answer for the memory.
Every variant is compared with the reference in the same run. A variant that fails is printed as
FAIL and the run goes on; past ``--budget-s`` what is left is skipped. A table for people, then one
JSON line; the same JSON goes to $OUT/kernels.json if OUT is set.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxengine.pallas_kernels.backends import load_function
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention import (
    DECODE_FUNCTIONS,
    RAGGED_FUNCTIONS,
    paged_attention,
)
from jaxengine.pallas_kernels.paged_attention_reference import paged_attention_reference
from jaxengine.pallas_kernels.target import Target
from jaxengine.pallas_kernels.tiles import triton_decode_config

from benchmarks.device_rates import device_rates, seconds_per_run

ERROR_LIMIT = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-4}


@dataclass(frozen=True)
class Case:
    """One shape: rows as (query tokens, KV length), decode rows first."""

    name: str
    rows: tuple[tuple[int, int], ...]
    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    table_width: int = 0  # 0: as wide as the longest row needs
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attention_options(self) -> AttentionOptions:
        """How scores are made."""
        return AttentionOptions(self.head_dim**-0.5, **self.options)

    @property
    def num_tokens(self) -> int:
        """T: query tokens of all rows."""
        return sum(query_len for query_len, _ in self.rows)

    @property
    def kv_bytes(self) -> int:
        """K and V that must be read once."""
        window = self.options.get("sliding_window") or 1 << 40
        tokens = sum(min(seq_len, window + query_len - 1) for query_len, seq_len in self.rows)
        return 2 * tokens * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Of the two products, over visible keys only (no sliding window)."""
        keys = sum(n * (s - n) + n * (n + 1) // 2 for n, s in self.rows)
        return 4 * keys * self.num_kv_heads * self.group * self.head_dim


def decode_case(num_rows: int, context: int, **kwargs: Any) -> Case:
    name = kwargs.pop("name", f"decode {num_rows}x{context}")
    rows = ((1, context),) * (num_rows - 1) + ((1, max(1, context - 7)),)
    return Case(name, rows, **kwargs)


def uneven_rows(num_rows: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Contexts as a chat server sees them: most are short, a few are long."""
    lengths = np.random.default_rng(seed).lognormal(6.0, 1.0, num_rows).clip(16, 8192)
    return tuple((1, int(length)) for length in lengths)


DECODE_TARGETS = [
    decode_case(64, 2048),
    decode_case(256, 384),
    decode_case(1000, 256),
    decode_case(16, 2048),
]
DECODE_MORE = [
    decode_case(1, 1024),
    decode_case(8, 384),
    decode_case(4, 16384),
    Case("decode 256 uneven", uneven_rows(256)),
    decode_case(64, 2048, name="decode 64x2048 W=8192", table_width=8192),
    decode_case(64, 2048, name="decode 64x2048 block 64", block_size=64),
    decode_case(256, 384, name="decode 256x384 block 32", block_size=32),
    decode_case(256, 384, name="decode 256x384 block 64", block_size=64),
    decode_case(256, 384, name="decode 256x384 G=2", group=2),
    decode_case(256, 384, name="decode 256x384 H=64 K=3 G=3", head_dim=64, num_kv_heads=3, group=3),
    decode_case(64, 2048, name="decode 64x2048 H=256", head_dim=256, num_kv_heads=4),
    decode_case(64, 2048, name="decode 64x2048 H=80 MHA", head_dim=80, num_kv_heads=8, group=1),
    decode_case(64, 8192, name="decode 64x8192 window 1024", options={"sliding_window": 1024}),
    decode_case(
        64, 2048, name="decode 64x2048 fp16 cap", dtype="float16", options={"logits_soft_cap": 30.0}
    ),
]
DECODE_SWEPT = [
    decode_case(64, 2048),
    decode_case(256, 384),
    Case("decode 256 uneven", uneven_rows(256)),
    decode_case(16, 2048),
    decode_case(1, 1024),
]
RAGGED = [
    Case("ragged 8x2048", ((2048, 2048),) * 8),
    Case("ragged 2x8192", ((8192, 8192),) * 2),
    Case("ragged 4x512 after 4096", ((512, 4608),) * 4),
    Case("ragged 16 uneven", tuple((n, n) for n in range(64, 1024, 60))),
]
MIXED = [Case("mixed 128 decode + 4x1024", ((1, 1000),) * 128 + ((1024, 2048),) * 4)]
TINY = [
    decode_case(3, 40, num_kv_heads=2, group=3, head_dim=64, dtype="float32"),
    Case("ragged 2x40", ((40, 40), (7, 60)), 2, 3, 64, dtype="float32"),
    Case("mixed 2 decode + 20", ((1, 30), (1, 3), (20, 33)), 2, 3, 64, dtype="float32"),
]


@dataclass
class Inputs:
    """A case on the device; ``tables`` lead to different blocks, one for each call."""

    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    tables: list[jax.Array]
    seq_lens: jax.Array
    query_start_loc: jax.Array
    num_decode_rows: jax.Array


class Caches:
    """The K and V caches of the last cache shape asked for: one pair at a time is kept."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._key: tuple[Any, ...] = ()
        self._caches: tuple[jax.Array, ...] = ()

    def get(self, case: Case) -> tuple[jax.Array, ...]:
        """K and V of random blocks, at least as many as the case needs."""
        tail = (case.num_kv_heads, case.block_size, case.head_dim)
        block_bytes = int(np.prod(tail)) * jnp.dtype(case.dtype).itemsize
        blocks = 1 + sum(-(-s // case.block_size) for _, s in case.rows)
        shape = (max(blocks, self._total_bytes // 2 // block_bytes), *tail)
        if self._key != (shape, case.dtype):
            self._caches = ()  # free the old pair first
            draw = jax.jit(lambda key: jax.random.normal(key, shape, case.dtype))
            self._caches = draw(jax.random.key(1)), draw(jax.random.key(2))
            self._key = (shape, case.dtype)
        return self._caches


def make_inputs(case: Case, caches: Caches, num_calls: int) -> Inputs:
    rng = np.random.default_rng(0)
    k_cache, v_cache = caches.get(case)
    blocks = [-(-s // case.block_size) for _, s in case.rows]
    tables = []
    order = rng.permutation(k_cache.shape[0] - 1) + 1
    for _ in range(num_calls):
        table = np.zeros((len(case.rows), case.table_width or max(blocks)), np.int32)
        order = np.roll(order, sum(blocks))
        ends = np.cumsum(blocks)
        for row, (end, count) in enumerate(zip(ends, blocks, strict=True)):
            table[row, :count] = order[end - count : end]
        tables.append(jnp.asarray(table))
    query_lens = [n for n, _ in case.rows]
    num_heads = case.num_kv_heads * case.group
    q = jax.random.normal(
        jax.random.key(0), (case.num_tokens, num_heads, case.head_dim), case.dtype
    )
    return Inputs(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        tables=tables,
        seq_lens=jnp.asarray([s for _, s in case.rows], jnp.int32),
        query_start_loc=jnp.asarray(np.concatenate([[0], np.cumsum(query_lens)]), jnp.int32),
        num_decode_rows=jnp.int32(sum(n == 1 for n in query_lens)),
    )


Attention = Callable[[jax.Array, Inputs, jax.Array], jax.Array]  # (q, inputs, table) -> out


def decode_with(implementation: str, case: Case, config: Any = None) -> Attention:
    def run(q: jax.Array, inputs: Inputs, table: jax.Array) -> jax.Array:
        function = load_function(DECODE_FUNCTIONS[implementation])
        kwargs = {} if config is None else {"config": config}
        return function(
            q, inputs.k_cache, inputs.v_cache, table, inputs.seq_lens,
            options=case.attention_options, target=Target.of(jax.devices()[0]), **kwargs,
        )  # fmt: skip

    return run


def ragged_with(implementation: str, case: Case, config: Any = None) -> Attention:
    def run(q: jax.Array, inputs: Inputs, table: jax.Array) -> jax.Array:
        function = load_function(RAGGED_FUNCTIONS[implementation])
        kwargs = {} if config is None else {"config": config}
        return function(
            q, inputs.k_cache, inputs.v_cache, table, inputs.seq_lens,
            inputs.query_start_loc, inputs.num_decode_rows,
            options=case.attention_options, target=Target.of(jax.devices()[0]), **kwargs,
        )  # fmt: skip

    return run


def op_with(implementation: str | None, case: Case) -> Attention:
    def run(q: jax.Array, inputs: Inputs, table: jax.Array) -> jax.Array:
        return paged_attention(
            q, inputs.k_cache, inputs.v_cache, table, inputs.seq_lens,
            inputs.query_start_loc, inputs.num_decode_rows,
            options=case.attention_options, target=Target.of(jax.devices()[0]),
            implementation=implementation,
        )  # fmt: skip

    return run


jax.tree_util.register_dataclass(Inputs, [f for f in Inputs.__dataclass_fields__], [])


class Bench:
    """Runs variants, prints each line as it comes, keeps the results."""

    def __init__(self, rates: dict[str, float], caches: Caches, budget_s: float) -> None:
        self.rates = rates
        self.results: list[dict[str, Any]] = []
        self.num_skipped = 0
        self._caches = caches
        self._deadline = time.monotonic() + budget_s

    def run_case(self, case: Case, variants: Iterator[tuple[str, str, Any, Attention]]) -> None:
        """Time ``(implementation, note, config, attention)`` variants of one shape."""
        variants = list(variants)
        if time.monotonic() > self._deadline:
            self.num_skipped += len(variants)
            return
        num_calls = 8 if case.kv_bytes >= 16e6 else 24
        inputs = make_inputs(case, self._caches, num_calls)
        expected = self._expected(case, inputs)
        for implementation, note, config, attention in variants:
            if time.monotonic() > self._deadline:
                self.num_skipped += 1
                continue
            calls = min(num_calls, 2) if implementation == "xla" else num_calls
            result = {"case": case.name, "implementation": implementation, "note": note}
            result["config"] = (
                asdict(config)
                if hasattr(config, "__dataclass_fields__")
                else (config._asdict() if config is not None else None)
            )
            try:
                self._time(case, attention, inputs, calls, expected, result)
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {error}"[:300]
            self.results.append(result)
            print(line(result), flush=True)

    def _expected(self, case: Case, inputs: Inputs) -> jax.Array:
        reference = functools.partial(paged_attention_reference, options=case.attention_options)
        out: jax.Array = jax.jit(reference)(
            inputs.q, inputs.k_cache, inputs.v_cache, inputs.tables[0], inputs.seq_lens,
            inputs.query_start_loc,
        )  # fmt: skip
        return out.astype(jnp.float32)

    def _time(
        self,
        case: Case,
        attention: Attention,
        inputs: Inputs,
        calls: int,
        expected: jax.Array,
        result: dict[str, Any],
    ) -> None:
        def chain(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
            first = q = attention(inputs.q, inputs, inputs.tables[0])
            for table in inputs.tables[1:calls]:
                q = attention(q, inputs, table)
            return first, q

        run = jax.jit(chain)
        start = time.perf_counter()
        got = run(inputs)[0]
        is_compared = slice(None)
        if case.name.startswith("ragged"):
            is_compared = slice(int(inputs.num_decode_rows), None)
        error = float(jnp.abs(got - expected)[is_compared].max())
        result["first_call_s"] = round(time.perf_counter() - start, 2)
        result["max_error"] = error
        seconds = seconds_per_run(run, inputs) / calls
        result["us"] = round(seconds * 1e6, 1)
        result["gb_s"] = round(case.kv_bytes / seconds / 1e9, 1)
        result["memory_share"] = round(result["gb_s"] / self.rates["memory_gb_s"], 3)
        result["tflop_s"] = round(case.flops / seconds / 1e12, 2)
        result["dot_share"] = round(result["tflop_s"] / self.rates["dot_tflop_s"], 3)
        if not error < ERROR_LIMIT[case.dtype]:
            result["error"] = f"wrong: differs from the reference by {error:.1e}"


def line(result: dict[str, Any]) -> str:
    head = f"{result['case']:32} {result['implementation']:9} {result['note']:34}"
    if "us" not in result:
        return f"{head} FAIL {result['error'][:160]}"
    numbers = (
        f"{result['us']:9.1f} us {result['gb_s']:7.0f} GB/s "
        f"{result['memory_share']:6.1%} of memory "
        f"{result['tflop_s']:6.1f} TFLOP/s {result['dot_share']:6.1%} of dot "
        f"err {result['max_error']:.0e} first {result['first_call_s']:.1f} s"
    )
    return f"{head} {numbers}{' FAIL ' + result['error'] if 'error' in result else ''}"


def shipped(case: Case, implementations: list[str]) -> Iterator[tuple[str, str, Any, Attention]]:
    make = decode_with if case.name.startswith("decode") else ragged_with
    for implementation in implementations:
        if case.name.startswith("mixed"):
            yield implementation, "op", None, op_with(implementation, case)
        else:
            yield implementation, "shipped", None, make(implementation, case)


def decode_sweep(case: Case, implementation: str) -> Iterator[tuple[str, str, Any, Attention]]:
    """One or two parameters changed at a time, from the shipped configuration."""
    splits: list[dict[str, Any]] = [
        {"splits_per_sm": 2},
        {"splits_per_sm": 8},
        {"min_split_tokens": 64},
        {"min_split_tokens": 256},
        {"min_split_tokens": 512},
    ]
    num_sms = Target.of(jax.devices()[0]).num_sms
    base = triton_decode_config(
        case.head_dim, len(case.rows), case.num_kv_heads, case.group, num_sms
    )
    steps: list[dict[str, Any]] = [
        {"num_stages": 6},  # 2 to 4 compile to the same ring
        {"tile_kv": 32, "num_stages": 4},
        {"tile_kv": 128},
        {"tile_kv": 128, "num_warps": 8},
        {"num_warps": 2},
        {"num_warps": 8},
        {"tile_kv": 32, "num_warps": 2, "num_stages": 4},
        {"tile_kv": 32, "num_warps": 1, "num_stages": 4},
        *splits,
    ]
    for step in steps:
        config = replace(base, **step)
        note = " ".join(f"{key}={value}" for key, value in step.items()) or "base"
        yield implementation, note, config, decode_with(implementation, case, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="tile sizes too")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU runs in seconds")
    parser.add_argument("--only", default="", help="cases whose name contains one of a,b,c")
    parser.add_argument("--implementations", default="triton,mosaic,xla")
    parser.add_argument("--budget-s", type=float, default=230.0)
    parser.add_argument("--cache-gb", type=float, default=6.0, help="size of K and V together")
    args = parser.parse_args()

    device = jax.devices()[0]
    rates = device_rates(args.tiny)
    print(f"{device.device_kind}, jax {jax.__version__}: " + ", ".join(
        f"{key} {value:.0f}" for key, value in rates.items()), flush=True)  # fmt: skip
    caches = Caches(1 << 20 if args.tiny else int(args.cache_gb * 1e9))
    bench = Bench(rates, caches, args.budget_s)
    implementations = args.implementations.split(",")

    def is_asked(case: Case) -> bool:
        return any(part in case.name for part in args.only.split(","))

    if args.tiny:
        for case in TINY:
            bench.run_case(case, shipped(case, implementations))
    else:
        for case in filter(is_asked, [*DECODE_TARGETS, *DECODE_MORE, *RAGGED, *MIXED]):
            bench.run_case(case, shipped(case, implementations))
        for case in filter(is_asked, DECODE_SWEPT if args.sweep else []):
            for implementation in implementations:
                if implementation != "xla":
                    bench.run_case(case, decode_sweep(case, implementation))

    print_best(bench.results)
    if bench.num_skipped:
        print(f"{bench.num_skipped} variants skipped: past --budget-s {args.budget_s:.0f}")
    report = {"device": device.device_kind, "jax": jax.__version__, **rates,
              "num_skipped": bench.num_skipped, "results": bench.results}  # fmt: skip
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "kernels.json").write_text(json.dumps(report))
    print(json.dumps(report))


def print_best(results: list[dict[str, Any]]) -> None:
    print("\nbest of each case")
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        if "error" not in result:
            held = best.setdefault(result["case"], result)
            if result["us"] < held["us"]:
                best[result["case"]] = result
    for result in best.values():
        print(line(result))


if __name__ == "__main__":
    main()
