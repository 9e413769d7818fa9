"""``jaxengine bench KIND``: the benchmarks by name."""

import argparse
import importlib
from collections.abc import Sequence

from jaxengine.cli.arguments import hyphenate

# Kind -> module with ``<kind>_parser`` and ``run_<kind>``, and what it measures.
KINDS = {
    "latency": ("bench_offline", "one batch of requests again and again"),
    "throughput": ("bench_offline", "many requests that are all there at once"),
    "serve": ("bench_serve", "latencies and throughput of a server under load"),
    "startup": ("bench_startup", "starts up to the first token, cold and warm"),
}


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxengine bench",
        usage="jaxengine bench KIND [arguments] [--help]",
        description="Measure speed.\n\nkinds:\n"
        + "\n".join(f"  {kind:12} {text}" for kind, (_, text) in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, help=argparse.SUPPRESS)
    kind = parser.parse_args(list(arguments[:1])).kind
    module = importlib.import_module(f"jaxengine.cli.{KINDS[kind][0]}")
    options = getattr(module, f"{kind}_parser")().parse_args(hyphenate(arguments[1:]))
    return getattr(module, f"run_{kind}")(options)
