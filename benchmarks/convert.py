"""Conversion against a plain copy: speed and peak memory on a random Llama checkpoint.

    python benchmarks/convert.py --gigabytes 4

Makes a sharded safetensors checkpoint in a temporary directory, copies its files (with fsync) and
converts it with the command line tool in a process of its own, in turns. Everything is deleted at
the end. The copy and the conversion both read from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE, HIDDEN, MLP, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 128256, 2048, 8192, 32, 8, 64
SHARD_BYTES = 1_000_000_000

CONVERT = """
import sys
from jaxengine.convert.__main__ import main
status = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak_kib", peak.split()[1])
sys.exit(status)
"""


def tensor_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN)}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (NUM_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, NUM_HEADS * HEAD_DIM),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, MLP),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB_SIZE, HIDDEN)}


def num_layers_for(gigabytes: float) -> int:
    outside, one = (2 * sum(map(np.prod, tensor_shapes(n).values())) for n in (0, 1))
    return max(1, round((gigabytes * 1e9 - outside) / (one - outside)))


def make_checkpoint(directory: Path, gigabytes: float) -> int:
    """Write the checkpoint; returns the bytes of its largest tensor."""
    num_layers = num_layers_for(gigabytes)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    shard_bytes = 0
    for name, shape in tensor_shapes(num_layers).items():
        size = 2 * int(np.prod(shape))
        if shards[-1] and shard_bytes + size > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = shape
        shard_bytes += size
    rng, weight_map = np.random.default_rng(0), {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: np.frombuffer(rng.bytes(2 * int(np.prod(shape))), ml_dtypes.bfloat16).reshape(
                shape
            )
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    os.sync()
    return 2 * VOCAB_SIZE * HIDDEN


def copy_seconds(source: Path, target: Path) -> float:
    start = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def convert_run(source: Path, target: Path) -> tuple[float, int]:
    """Convert in a new process; returns seconds, start of Python included, and peak bytes."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(target)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    seconds = time.perf_counter() - start
    return seconds, 1024 * int(done.stdout.split("peak_kib")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where to work (default: the system's temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        work = Path(name).resolve()
        source = work / "source"
        source.mkdir()
        largest = make_checkpoint(source, options.gigabytes)
        num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        copies, conversions, peaks = [], [], []
        for _ in range(options.repeats):
            copies.append(copy_seconds(source, work / "copy"))
            shutil.rmtree(work / "copy")
            seconds, peak = convert_run(source, work / "converted")
            shutil.rmtree(work / "converted")
            conversions.append(seconds)
            peaks.append(peak)
    report(num_bytes, largest, copies, conversions, peaks)


def report(
    num_bytes: int, largest: int, copies: list[float], conversions: list[float], peaks: list[int]
) -> None:
    copy, conversion = statistics.median(copies), statistics.median(conversions)
    result = {
        "benchmark": "convert",
        "gigabytes": round(num_bytes / 1e9, 2),
        "copy_s": round(copy, 2),
        "convert_s": round(conversion, 2),
        "copy_mb_per_s": round(num_bytes / copy / 1e6),
        "convert_mb_per_s": round(num_bytes / conversion / 1e6),
        "speed_relative_to_copy": round(copy / conversion, 2),
        "peak_rss_gb": round(max(peaks) / 1e9, 2),
        "largest_tensor_gb": round(largest / 1e9, 2),
        "peak_rss_beyond_largest_tensor_gb": round((max(peaks) - largest) / 1e9, 2),
        "all_copy_s": [round(seconds, 2) for seconds in copies],
        "all_convert_s": [round(seconds, 2) for seconds in conversions],
    }
    for key, value in result.items():
        print(f"{key:36} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
