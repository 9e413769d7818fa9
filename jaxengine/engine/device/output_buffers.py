"""Memory for the outputs of steps that later steps write to again.

On a GPU a step is one CUDA graph, which holds the addresses that its kernels read and write. If one
has changed since the last launch, XLA updates the graph, on the host, kernel by kernel. A new array
for each output moves the temporaries as well, so everything changes: Qwen3-0.6B, 256 rows, takes
3.6 ms to launch that way, and 1.5 ms with outputs that stay where they are (benchmarks/LOG.md).
The price is memory, 1.3 GB for all sizes up to 1,024 rows with 128,256 words in bfloat16.
"""

import collections
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxengine.sharding import LOGITS_SPEC, replicated

MAX_ROWS = 1024  # above, a step takes the GPU longer than the host, and logits are large


class OutputBuffers:
    """Outputs of past steps, by their number of rows.

    Args:
        mesh: Devices that hold the outputs: each all token ids, and its part of the logits.
        vocab_size: V.
        dtype: Of the logits.
        max_in_flight: So many steps later the host has read a step's token ids.
    """

    def __init__(self, mesh: Mesh, *, vocab_size: int, dtype: str, max_in_flight: int) -> None:
        self._mesh = mesh
        self._logits_sharding = NamedSharding(mesh, LOGITS_SPEC)
        self._vocab_size = vocab_size
        self._dtype = jnp.dtype(dtype)
        self._num_token_ids = max_in_flight + 1
        self._logits: dict[int, jax.Array] = {}
        self._token_ids: dict[int, collections.deque[jax.Array]] = {}

    def serves(self, num_rows: int) -> bool:
        """Whether steps of so many rows take their outputs' memory from here."""
        return num_rows <= MAX_ROWS

    def num_bytes(self, row_counts: Iterable[int]) -> int:
        """Bytes on one device once steps of all these numbers of rows have run."""
        width = self._vocab_size // self._mesh.size
        return sum(
            num_rows * (width * self._dtype.itemsize + 4 * self._num_token_ids)
            for num_rows in set(row_counts)
            if self.serves(num_rows)
        )

    def allocate(self, row_counts: Iterable[int]) -> None:
        """Make the memory of all these numbers of rows, in one program instead of many."""
        needed = {n for n in row_counts if self.serves(n)} - self._token_ids.keys()
        shapes = {}
        for num_rows in sorted(needed):
            token_ids, logits = self.abstract(num_rows)
            shapes[num_rows] = ([token_ids] * self._num_token_ids, logits)
        make = jax.jit(
            lambda: jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes),
            out_shardings=jax.tree.map(lambda like: like.sharding, shapes),
        )
        for num_rows, (spares, made) in make().items():
            self._token_ids[num_rows] = collections.deque(spares)
            self._logits[num_rows] = made

    def abstract(self, num_rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What ``take`` returns, as shapes, to compile with before it exists."""
        logits = (num_rows, self._vocab_size)
        return (
            jax.ShapeDtypeStruct((num_rows,), jnp.int32, sharding=replicated(self._mesh)),
            jax.ShapeDtypeStruct(logits, self._dtype, sharding=self._logits_sharding),
        )

    def take(self, num_rows: int) -> tuple[jax.Array, jax.Array]:
        """Return token ids [B] and logits [B, V] for a step to overwrite: donate them.

        The next step's logits follow on the same stream as what reads these; token ids are read by
        the host, so the oldest are taken.
        """
        if num_rows not in self._token_ids:
            self.allocate([num_rows])
        return self._token_ids[num_rows].popleft(), self._logits.pop(num_rows)

    def keep(self, token_ids: jax.Array, logits: jax.Array) -> None:
        """Take the outputs of the step that got what ``take`` returned last."""
        self._token_ids[len(token_ids)].append(token_ids)
        self._logits[len(logits)] = logits

    def clear(self) -> None:
        """Forget everything: a step that failed may have taken it along."""
        self._logits.clear()
        self._token_ids.clear()
