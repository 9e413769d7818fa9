"""How many KV blocks fit: an account of the device's memory from what XLA says each step needs."""

import dataclasses
import os
from pathlib import Path

import jax

GIB = 1 << 30
# What the driver keeps for itself outside XLA's pool (CUDA context, loaded kernels): about 1 GiB
# of an 80 GiB card.
DRIVER_FRACTION = 0.0125
# Room for what the account cannot see: autotuning scratch, transfers, fragmentation.
SLACK_BYTES = 256 << 20
# The KV cache of a CPU, unless the user asks for another size: what one sequence of the model's
# length takes, within these.
MIN_CPU_CACHE_BYTES, MAX_CPU_CACHE_BYTES = GIB // 2, 4 * GIB


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """Where one device's memory goes; all sizes in bytes on one device.

    Attributes:
        total_bytes: What the device has.
        limit_bytes: What the engine may use of it.
        weight_bytes: The parameters.
        step_bytes: The largest step's temporaries and outputs, as XLA reports them.
        state_bytes: Block tables and the logits of the steps in flight.
        block_bytes: One KV block.
        num_blocks: KV blocks.
    """

    total_bytes: int
    limit_bytes: int
    weight_bytes: int
    step_bytes: int
    state_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int

    @property
    def cache_bytes(self) -> int:
        """The KV cache."""
        return self.num_blocks * self.block_bytes

    def table(self) -> str:
        """The account as text, a line an entry."""
        used = self.weight_bytes + self.step_bytes + self.state_bytes + self.cache_bytes
        lines = [
            ("device memory", self.total_bytes, ""),
            ("usable", self.limit_bytes, "gpu_memory_utilization, less the driver's share"),
            ("weights", self.weight_bytes, ""),
            ("largest step", self.step_bytes, "as compiled by XLA"),
            ("tables, logits", self.state_bytes, ""),
            (
                "KV cache",
                self.cache_bytes,
                f"{self.num_blocks} blocks of {self.block_size} tokens: "
                f"{self.num_blocks * self.block_size:,} tokens",
            ),
            ("left", self.limit_bytes - used, ""),
        ]
        return "\n".join(f"  {name:<15}{size / GIB:9.2f} GiB  {note}" for name, size, note in lines)


def default_cpu_cache_bytes(limit_bytes: int, sequence_bytes: int) -> int:
    """Return the size of a CPU's KV cache that nobody has asked for.

    Args:
        limit_bytes: What the engine may use of the memory.
        sequence_bytes: K/V of one sequence of the model's length.
    """
    wanted = min(max(sequence_bytes, MIN_CPU_CACHE_BYTES), MAX_CPU_CACHE_BYTES)
    return min(wanted, limit_bytes // 4)


def num_blocks_that_fit(
    *, limit_bytes: int, weight_bytes: int, step_bytes: int, state_bytes: int, block_bytes: int
) -> int:
    """Return the KV blocks for which the rest leaves room.

    Raises:
        ValueError: If not even two fit, with what was needed and what there was.
    """
    needed = weight_bytes + step_bytes + state_bytes + SLACK_BYTES
    num_blocks = (limit_bytes - needed) // block_bytes
    if num_blocks < 2:
        raise ValueError(
            f"not enough device memory: weights {weight_bytes / GIB:.2f} GiB, largest step "
            f"{step_bytes / GIB:.2f} GiB, tables and logits {state_bytes / GIB:.2f} GiB and slack "
            f"{SLACK_BYTES / GIB:.2f} GiB leave {(limit_bytes - needed) / GIB:.2f} of "
            f"{limit_bytes / GIB:.2f} GiB for the KV cache. Raise --gpu-memory-utilization, lower "
            "--max-num-batched-tokens or --max-num-seqs, or use more GPUs "
            "(--tensor-parallel-size)"
        )
    return num_blocks


def check_fits(limit_bytes: int, other_bytes: int, cache_bytes: int) -> None:
    """Raise if a KV cache of a size that the user chose does not fit.

    Raises:
        ValueError: With what was needed, what there was, and what to lower.
    """
    if other_bytes + cache_bytes > limit_bytes:
        raise ValueError(
            f"not enough memory: weights and tables {other_bytes / GIB:.2f} GiB and a KV cache of "
            f"{cache_bytes / GIB:.2f} GiB do not fit into {limit_bytes / GIB:.2f} GiB. Lower "
            "--kv-cache-memory-bytes, --num-gpu-blocks-override or --max-num-seqs"
        )


def device_limit(device: jax.Device, gpu_memory_utilization: float) -> tuple[int, int]:
    """Return a device's memory and what the engine may use of it, in bytes.

    On a GPU, a pool that was made smaller than ``gpu_memory_utilization`` allows is the limit. On
    a CPU it is the memory that other programs leave free.
    """
    if device.platform == "cpu":
        return _host_memory()
    stats = device.memory_stats() or {}
    pool = stats.get("bytes_limit", 0)
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    total = int(pool / fraction) if pool else 0
    limit = min(int(total * (gpu_memory_utilization - DRIVER_FRACTION)), pool)
    return total, limit - _bytes_of_others(stats)


def _host_memory() -> tuple[int, int]:
    """Bytes of memory, and of those what can be had: free pages and cached files, which give way.

    (Free pages alone are few wherever a large file has just been read or written.)
    """
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    available = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    return total, max([free, *available])


def _bytes_of_others(stats: dict) -> int:
    """What else in this process holds device memory (another engine, the user's arrays)."""
    return int(stats.get("bytes_in_use", 0))
