"""A pipeline stage: its weights, its share of the KV cache, its compiled programs.

Every stage sees every step, in the order of dispatch, and keeps its own block tables.
"""

import functools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.batch import StepShape
from jaxengine.engine.batch_builder import TableUpdates
from jaxengine.engine.compiler_options import CompilerOptions, compiler_options
from jaxengine.engine.kv_cache import KVCacheSpec
from jaxengine.engine.output_buffers import OutputBuffers
from jaxengine.engine.program_cache import ProgramCache
from jaxengine.engine.step import StageParts, apply_table_updates, make_forward
from jaxengine.sharding import replicate, replicated
from jaxengine.weights import Params

TABLE_UPDATE_SIZE = 4096  # entries of one overflow update

# Tracing a step needs the interpreter, XLA's work on it does not. Threads that trace at the same
# time share the interpreter and end together, the largest step too, which XLA then takes longest
# for. One after the other, the first is with XLA while the rest is being traced.
_TRACING = threading.Lock()


class Stage:
    """One group of devices and the layers that they run.

    Args:
        parts: Its share of the model.
        cache_spec: Shape of its KV cache.
        hidden_size: D, of what it hands to the next stage.
        max_num_seqs: Slots of device-side state.
        max_blocks_per_seq: Width of the block tables.
        program_cache: Keeps the compiled steps between runs; None for jax's own cache alone.
        output_buffers: Memory that steps of few rows write token ids and logits to; None gives
            each step new arrays. Only the last stage has any.
    """

    def __init__(
        self,
        parts: StageParts,
        *,
        cache_spec: KVCacheSpec,
        hidden_size: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        program_cache: ProgramCache | None = None,
        output_buffers: OutputBuffers | None = None,
    ) -> None:
        self.parts = parts
        self.cache_spec = cache_spec
        self.params: Params = {}
        self.compile_seconds: dict[StepShape, float] = {}
        self._hidden_size = hidden_size
        self._max_num_seqs = max_num_seqs
        self._table_shape = (max_num_seqs + 1, max_blocks_per_seq)
        self.num_blocks = 0
        self._program_cache = program_cache
        self.output_buffers = output_buffers
        self._programs: dict[tuple[StepShape, bool], jax.stages.Compiled] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters on one device."""
        num_shards = self.parts.mesh.size
        specs = self.parts.specs.values()
        return sum(s.num_bytes // (num_shards if any(s.spec) else 1) for s in specs)

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one device."""
        return self.cache_spec.block_bytes // self.parts.mesh.size

    @property
    def table_bytes(self) -> int:
        """Bytes of the block tables on one device; a step that updates them holds them twice."""
        return 2 * 4 * self._table_shape[0] * self._table_shape[1]

    def set_num_blocks(self, num_blocks: int) -> None:
        """Decide the size of the cache, which is part of every program."""
        if num_blocks != self.num_blocks:
            self._programs.clear()
            self.num_blocks = num_blocks

    def start(self, params: Params) -> None:
        """Take the weights and allocate the KV cache and the device-side state."""
        self.params = params
        self.allocate_state()

    def allocate_state(self) -> None:
        """Make the cache, the block tables and the newest tokens, all zeros."""
        mesh = self.parts.mesh
        self.caches = self.cache_spec.allocate(self.num_blocks, mesh)
        self.tables = replicate(np.zeros(self._table_shape, np.int32), mesh)
        self.last_tokens = replicate(np.zeros(self._max_num_seqs, np.int32), mesh)

    def restore_state(self) -> None:
        """Make the state anew if a step that failed has taken it along."""
        state = (self.caches, self.tables, self.last_tokens)
        if any(array.is_deleted() for array in jax.tree.leaves(state)):
            self.allocate_state()
        if self.output_buffers is not None:
            self.output_buffers.clear()

    def apply_overflow(self, updates: TableUpdates) -> None:
        """Store block-table entries that did not fit into a step's vector."""
        for start in range(0, updates.shape[1], TABLE_UPDATE_SIZE):
            part = updates[:, start : start + TABLE_UPDATE_SIZE]
            padding = TABLE_UPDATE_SIZE - part.shape[1]
            rows_past_the_end = [[self._table_shape[0]], [0], [0]]
            part = np.concatenate([part, np.repeat(rows_past_the_end, padding, axis=1)], axis=1)
            self.tables = apply_table_updates(self.tables, part.astype(np.int32))

    def run(
        self,
        shape: StepShape,
        packed: np.ndarray,
        hidden: jax.Array | None,
        *,
        returns_hidden: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Dispatch a step; returns at once.

        Args:
            shape: Padded sizes.
            packed: The step's vector.
            hidden: The stage before's output [T, D] on this stage's devices; None for the first.
            returns_hidden: Whether the last stage also returns its layers' output.

        Returns:
            The layers' output [T, D], or from the last stage token ids [B], logits [B, V] and
            with ``returns_hidden`` that output.
        """
        forward = self.program(shape, returns_hidden)
        others: tuple[jax.Array, ...] = () if hidden is None else (hidden,)
        buffers = self._buffers_of(shape)
        if buffers is not None:
            others += buffers.take(shape.num_rows)
        self.caches, self.tables, self.last_tokens, *outputs = forward(
            self.params, self.caches, self.tables, self.last_tokens, packed, *others
        )
        if buffers is not None:
            buffers.keep(*outputs[:2])
        return tuple(outputs)

    def _buffers_of(self, shape: StepShape) -> OutputBuffers | None:
        buffers = self.output_buffers
        return buffers if buffers is not None and buffers.serves(shape.num_rows) else None

    def program(self, shape: StepShape, returns_hidden: bool = False) -> jax.stages.Compiled:
        """Return the compiled forward step of a shape; compiles it the first time."""
        key = (shape, returns_hidden)
        if key not in self._programs:
            self._programs[key] = self._load_or_compile(shape, returns_hidden)
        return self._programs[key]

    def has_program(self, shape: StepShape) -> bool:
        """Whether the forward step of a shape is compiled."""
        return (shape, False) in self._programs

    def step_bytes(self, shape: StepShape) -> int:
        """Temporaries and outputs of a step as XLA reports them, in bytes on one device."""
        analysis: Any = self.program(shape).memory_analysis()
        outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + max(outputs, 0)

    def _load_or_compile(self, shape: StepShape, returns_hidden: bool) -> jax.stages.Compiled:
        options = compiler_options(self.parts.platform, shape.num_tokens)
        overwrites_outputs = self._buffers_of(shape) is not None
        compile_step = functools.partial(self._compile, shape, returns_hidden, options)
        if self._program_cache is None:
            return compile_step()
        state = (self.cache_spec, self.num_blocks, self._table_shape, self._max_num_seqs)
        facts = (*state, shape, returns_hidden, overwrites_outputs, options)
        started = time.perf_counter()
        self.compile_seconds.pop(shape, None)
        program = self._program_cache.get(facts, compile_step)
        self.compile_seconds.setdefault(shape, time.perf_counter() - started)  # if it was loaded
        return program

    def _compile(
        self, shape: StepShape, returns_hidden: bool, options: CompilerOptions
    ) -> jax.stages.Compiled:
        parts = self.parts
        mesh = parts.mesh
        buffers = self._buffers_of(shape)
        forward = make_forward(
            shape,
            parts=parts,
            block_size=self.cache_spec.block_size,
            returns_hidden=returns_hidden,
            overwrites_outputs=buffers is not None,
        )

        def zeros(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=replicated(mesh))

        hidden = zeros(self.cache_spec.dtype, shape.num_tokens, self._hidden_size)
        with _TRACING:
            started = time.perf_counter()
            lowered = forward.lower(
                {path: spec.abstract(mesh) for path, spec in parts.specs.items()},
                self.cache_spec.abstract(self.num_blocks, mesh),
                zeros(jnp.int32, *self._table_shape),
                zeros(jnp.int32, self._max_num_seqs),
                zeros(jnp.int32, shape.packed_size),
                *([] if parts.is_first else [hidden]),
                *([] if buffers is None else buffers.abstract(shape.num_rows)),
            )
        program = lowered.compile(options)
        self.compile_seconds[shape] = time.perf_counter() - started
        return program
