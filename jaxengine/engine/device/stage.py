"""A pipeline stage: its weights, its share of the KV cache, its compiled programs.

Every stage sees every step, in the order of dispatch, and keeps its own block tables.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.batch import StepShape
from jaxengine.engine.device.batch_builder import TableUpdates
from jaxengine.engine.device.compiler_options import CompilerOptions, compiler_options
from jaxengine.engine.device.kv_cache import KVCacheSpec
from jaxengine.engine.device.output_buffers import OutputBuffers
from jaxengine.engine.device.peer_memory import PeerMemory
from jaxengine.engine.device.program_cache import ProgramCache, compile_lowered
from jaxengine.engine.device.step import (
    ForwardOutputs,
    StageParts,
    StepArguments,
    StepState,
    apply_table_updates,
    make_forward,
    store_tokens,
)
from jaxengine.pallas_kernels.failures import num_retired, without_failing_kernels
from jaxengine.pallas_kernels.peers import InboxLayout
from jaxengine.sharding import replicate, replicated
from jaxengine.weights import Params

TABLE_UPDATE_SIZE = 4096  # entries of one overflow update


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A step that XLA has not seen yet, and the seconds that tracing it took."""

    shape: StepShape
    returns_hidden: bool
    lowered: jax.stages.Lowered
    seconds: float
    num_retired: int  # kernels known not to compile when it was traced


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step's program, whether it may be kept on disk, and the seconds it took altogether."""

    shape: StepShape
    returns_hidden: bool
    program: jax.stages.Compiled
    is_storable: bool
    seconds: float


class Stage:
    """One group of devices and the layers that they run.

    Args:
        parts: Its share of the model.
        cache_spec: Shape of its KV cache.
        hidden_size: D, of what it hands to the next stage.
        max_num_seqs: Slots of device-side state.
        max_blocks_per_seq: Width of the block tables.
        program_cache: Keeps the compiled steps between runs; None for jax's own cache alone.
        output_buffers: Memory that steps write token ids and logits to again; None gives
            each step new arrays. Only the last stage has any.
        peer_memory: Where its devices write to each other; None lets XLA add up.
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
        peer_memory: PeerMemory | None = None,
    ) -> None:
        self.parts = parts
        self.cache_spec = cache_spec
        self.params: Params = {}
        self._weights: tuple[jax.Array, ...] = ()  # the same, as steps take them
        self.compile_seconds: dict[StepShape, float] = {}
        self._hidden_size = hidden_size
        self._max_num_seqs = max_num_seqs
        self._table_shape = (max_num_seqs + 1, max_blocks_per_seq)
        self.num_blocks = 0
        self.program_cache = program_cache
        self.output_buffers = output_buffers
        self._peer_memory = peer_memory
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

    @property
    def peer_bytes(self) -> int:
        """Bytes on one device that the others write to."""
        return 0 if self._peer_memory is None else self._peer_memory.layout.num_bytes

    def set_num_blocks(self, num_blocks: int) -> None:
        """Decide the size of the cache, which is part of every program."""
        if num_blocks != self.num_blocks:
            self._programs.clear()
            self.num_blocks = num_blocks

    def start(self, params: Params) -> None:
        """Take the weights and allocate the KV cache and the device-side state."""
        self.params = params
        self._weights = tuple(params[path] for path in self.parts.specs)
        if self._peer_memory is not None:
            self._peer_memory.allocate()
        self.allocate_state()

    def replace_weights(self, new: Iterable[tuple[str, jax.Array]]) -> None:
        """Take other weights, cut and shaped as the ones before; state and programs stay.

        Args:
            new: Pairs of path and array. The old array may be freed before the next pair is asked
                for.
        """
        self._weights = ()
        try:
            self.params.update(new)
        finally:
            self._weights = tuple(self.params[path] for path in self.parts.specs)

    def release(self) -> Params:
        """Give up weights, cache and state, until ``start``; returns the weights."""
        params, self.params, self._weights = self.params, {}, ()
        for array in jax.tree.leaves(self.state):
            array.delete()
        if self.output_buffers is not None:
            self.output_buffers.clear()
        return params

    def allocate_state(self) -> None:
        """Make the cache, the block tables and the newest tokens, all zeros."""
        mesh = self.parts.mesh
        self.state = StepState(
            self.cache_spec.allocate(self.num_blocks, mesh),
            replicate(np.zeros(self._table_shape, np.int32), mesh),
            replicate(np.zeros(self._max_num_seqs, np.int32), mesh),
        )

    def restore_state(self) -> None:
        """Make the state anew if a step that failed has taken it along."""
        if any(array.is_deleted() for array in jax.tree.leaves(self.state)):
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
            tables = apply_table_updates(self.state.tables, part.astype(np.int32))
            self.state = self.state._replace(tables=tables)

    def store_tokens(self, targets: np.ndarray, token_ids: jax.Array) -> None:
        """Store tokens that were sampled elsewhere.

        Args:
            targets: [B] int32, the slot of each; past the end for none.
            token_ids: [B] int32, on this stage's devices.
        """
        self.keep_last_tokens(store_tokens(self.state.last_tokens, targets, token_ids))

    def keep_last_tokens(self, last_tokens: jax.Array) -> None:
        """Take over the newest tokens that a program made of ``state.last_tokens``."""
        self.state = self.state._replace(last_tokens=last_tokens)

    def run(
        self,
        shape: StepShape,
        packed: np.ndarray,
        hidden: jax.Array | None,
        *,
        returns_hidden: bool = False,
    ) -> ForwardOutputs:
        """Dispatch a step; returns at once.

        Args:
            shape: Padded sizes.
            packed: The step's vector.
            hidden: The stage before's output [T, D] on this stage's devices; None for the first.
            returns_hidden: Whether the last stage also returns its layers' output.
        """
        forward = self.program(shape, returns_hidden)
        addresses = None if self._peer_memory is None else self._peer_memory.addresses
        arguments = StepArguments(packed, hidden, addresses)
        buffers = self._buffers_of(shape)
        overwritten = None if buffers is None else buffers.take(shape.num_rows)
        state, brought = forward(self._weights, tuple(self.state), tuple(arguments), overwritten)
        self.state, outputs = StepState(*state), ForwardOutputs(*brought)
        if buffers is not None:
            buffers.keep(outputs.token_ids, outputs.logits)
        return outputs

    def _buffers_of(self, shape: StepShape) -> OutputBuffers | None:
        buffers = self.output_buffers
        return buffers if buffers is not None and buffers.serves(shape.num_rows) else None

    def program(self, shape: StepShape, returns_hidden: bool = False) -> jax.stages.Compiled:
        """Return the compiled forward step of a shape; makes it the first time."""
        key = (shape, returns_hidden)
        if key not in self._programs and not self.load(shape, returns_hidden):
            self.keep(self.compile(self.lower(shape, returns_hidden)))
        return self._programs[key]

    def has_program(self, shape: StepShape) -> bool:
        """Whether the forward step of a shape is compiled."""
        return (shape, False) in self._programs

    def step_bytes(self, shape: StepShape) -> int:
        """Temporaries and outputs of a step as XLA reports them, in bytes on one device."""
        analysis: Any = self.program(shape).memory_analysis()
        outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + max(outputs, 0)

    def load(self, shape: StepShape, returns_hidden: bool = False) -> bool:
        """Take a step's program from the disk; False if it is not there."""
        if self.program_cache is None:
            return False
        started = time.perf_counter()
        program = self.program_cache.load(self._facts(shape, returns_hidden))
        if program is None:
            return False
        self._programs[shape, returns_hidden] = program
        self.compile_seconds[shape] = time.perf_counter() - started
        return True

    def compile(self, step: LoweredStep) -> CompiledStep:
        """Let XLA compile a step; changes nothing here, so several threads can do it.

        If a kernel turns out not to compile, the step is traced again without it.
        """
        started = time.perf_counter()
        attempts = self._attempts(step)
        program, is_storable = without_failing_kernels(
            lambda: compile_lowered(next(attempts).lowered, self._options(step.shape)),
            self.parts.local_device,
            step.num_retired,
        )
        seconds = step.seconds + time.perf_counter() - started
        return CompiledStep(step.shape, step.returns_hidden, program, is_storable, seconds)

    def _attempts(self, step: LoweredStep) -> Iterator[LoweredStep]:
        yield step
        while True:
            yield self.lower(step.shape, step.returns_hidden)

    def keep(self, step: CompiledStep) -> None:
        """Take a compiled step, and store it for the next start."""
        self._programs[step.shape, step.returns_hidden] = step.program
        self.compile_seconds[step.shape] = step.seconds
        if self.program_cache is not None and step.is_storable:
            self.program_cache.store(self._facts(step.shape, step.returns_hidden), step.program)

    def _options(self, shape: StepShape) -> CompilerOptions:
        parts = self.parts
        return compiler_options(parts.platform, shape.num_tokens, is_hopper=parts.is_on_hopper)

    def _facts(self, shape: StepShape, returns_hidden: bool) -> Sequence[object]:
        """What a step's program depends on, beside what is the same for all steps."""
        state = (self.cache_spec, self.num_blocks, self._table_shape, self._max_num_seqs)
        overwrites_outputs = self._buffers_of(shape) is not None
        how = (returns_hidden, overwrites_outputs, self._inbox_layout, self._options(shape))
        return (*state, shape, *how)

    @property
    def _inbox_layout(self) -> InboxLayout | None:
        return None if self._peer_memory is None else self._peer_memory.layout

    def lower(self, shape: StepShape, returns_hidden: bool = False) -> LoweredStep:
        """Trace a step. This holds the interpreter: threads doing it at once gain nothing.

        Kernels that do not lower are left out.
        """
        return without_failing_kernels(
            lambda: self._lower(shape, returns_hidden), self.parts.local_device
        )

    def _lower(self, shape: StepShape, returns_hidden: bool) -> LoweredStep:
        started, retired = time.perf_counter(), num_retired()
        parts = self.parts
        mesh = parts.mesh
        buffers = self._buffers_of(shape)
        forward = make_forward(
            shape,
            parts=parts,
            block_size=self.cache_spec.block_size,
            returns_hidden=returns_hidden,
            overwrites_outputs=buffers is not None,
            inbox_layout=self._inbox_layout,
        )

        def zeros(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=replicated(mesh))

        hidden = zeros(self.cache_spec.dtype, shape.num_tokens, self._hidden_size)
        state = StepState(
            self.cache_spec.abstract(self.num_blocks, mesh),
            zeros(jnp.int32, *self._table_shape),
            zeros(jnp.int32, self._max_num_seqs),
        )
        arguments = StepArguments(
            zeros(jnp.int32, shape.packed_size),
            None if parts.is_first else hidden,
            None if self._peer_memory is None else self._peer_memory.abstract(),
        )
        lowered = forward.lower(
            tuple(spec.abstract(mesh) for spec in parts.specs.values()),
            tuple(state),
            tuple(arguments),
            None if buffers is None else buffers.abstract(shape.num_rows),
        )
        seconds = time.perf_counter() - started
        return LoweredStep(shape, returns_hidden, lowered, seconds, retired)
