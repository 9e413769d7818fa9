"""``jaxengine collect-env``: what a bug report needs to say about the machine."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

PACKAGES = (
    *("jaxengine", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy"),
    *("transformers", "tokenizers", "safetensors", "orbax-checkpoint", "gguf"),
)
VARIABLES = ("JAX_", "XLA_", "CUDA_VISIBLE", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE")


def collect_environment() -> str:
    """Describe Python, the packages, the devices and the settings, a line each."""
    lines = [
        f"python: {sys.version.split()[0]}",
        f"platform: {platform.platform()}",
        f"cpu cores: {os.cpu_count()}",
        *(f"{name}: {_version(name)}" for name in PACKAGES),
        f"gpu: {_gpu()}",
        f"jax devices: {_jax_devices()}",
    ]
    lines += [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return "; ".join(result.stdout.splitlines()) or f"nvidia-smi failed: {result.stderr.strip()}"


def _jax_devices() -> str:
    # Asked in a process of its own: a GPU would stay taken, and a broken one may abort.
    code = "import jax; print(*jax.devices(), sep='; ')"
    command = [sys.executable, "-c", code]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"jax failed: {error}"
    last_error = (result.stderr.strip().splitlines() or ["no message"])[-1]
    return result.stdout.strip() or f"jax failed: {last_error}"
