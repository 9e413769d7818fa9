"""jaxengine-convert SOURCE OUT_DIR: converts a model once, to be loaded as it is."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from jaxengine.convert.save import convert_checkpoint
from jaxengine.convert.tensors import DTYPES


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    # Only Orbax's book-keeping runs on jax here: it must not take a GPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is as it should be
    try:
        summary = convert_checkpoint(
            options.source, options.out_dir, options.dtype, options.overwrite
        )
    except (ValueError, OSError) as error:
        print(f"jaxengine-convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxengine-convert: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxengine-convert",
        description="Convert a model into an Orbax checkpoint with its config and tokenizer.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="Hugging Face directory, GGUF file, or hub name"
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to make")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="convert to this dtype (default: as stored)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion in OUT_DIR"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
