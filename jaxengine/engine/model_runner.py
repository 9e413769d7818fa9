"""ModelRunner: owns weights, KV cache and the compiled steps; turns a SchedulerOutput into tokens.

It never waits for the device: ``execute`` returns a PendingStep whose tokens are read later.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxengine.batch import StepShape
from jaxengine.engine.batch_builder import BatchBuilder, TableUpdates
from jaxengine.engine.buckets import Buckets
from jaxengine.engine.kv_cache import KVCacheSpec
from jaxengine.engine.logprobs import TokenLogprobs
from jaxengine.engine.prompt_scorer import PromptScorer, PromptScores, is_scored
from jaxengine.engine.sampler import SamplerOutput
from jaxengine.engine.sampler_programs import SamplerPrograms
from jaxengine.engine.sampling_inputs import GREEDY, SamplingState
from jaxengine.engine.scheduler_output import SchedulerOutput
from jaxengine.engine.step import (
    apply_table_updates,
    compiler_options,
    make_forward,
    make_prompt_scorer,
)
from jaxengine.sharding import replicated
from jaxengine.weights import Params, ParamSpec

TABLE_UPDATE_SIZE = 4096  # entries of one overflow update


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A dispatched step: what was scheduled, and its tokens, still on the device.

    Attributes:
        sampled: Token ids [B] (and logprobs) of the padded rows.
        prompt_scores: Logprobs of prompt tokens; None if no row wants any.
    """

    scheduler_output: SchedulerOutput
    sampled: SamplerOutput
    prompt_scores: PromptScores | None

    def token_ids(self) -> np.ndarray:
        """Wait for the step and return the token ids of its real rows."""
        return np.asarray(self.sampled.token_ids)[: len(self.scheduler_output.rows)]

    def logprobs(self) -> TokenLogprobs | None:
        """Wait for the step and return its rows' logprobs; None if no row wants any."""
        return jax.tree.map(np.asarray, self.sampled.logprobs)


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A model taken apart: how to build it, what it holds, where it lives.

    Attributes:
        definition: From ``param_specs``.
        specs: Its parameters.
        mesh: The devices of its shards.
        vocab_size: V.
        activation_size: Numbers a token needs at the widest place of a layer, about.
    """

    definition: Any
    specs: dict[str, ParamSpec]
    mesh: Mesh
    vocab_size: int
    activation_size: int


class ModelRunner:
    """Runs steps on one tensor-parallel group.

    Args:
        parts: The model.
        cache_spec: Shape of its KV cache.
        buckets: The padded step sizes.
        max_num_seqs: Slots of device-side state.
        max_blocks_per_seq: Width of the block tables.
    """

    def __init__(
        self,
        parts: ModelParts,
        *,
        cache_spec: KVCacheSpec,
        buckets: Buckets,
        max_num_seqs: int,
        max_blocks_per_seq: int,
    ) -> None:
        self._parts = parts
        self._cache_spec = cache_spec
        self._buckets = buckets
        self._builder = BatchBuilder(max_num_seqs)
        self._max_num_seqs = max_num_seqs
        self._table_shape = (max_num_seqs + 1, max_blocks_per_seq)
        self._programs: dict[tuple[StepShape, bool], Callable] = {}
        self._prompt_scorer = PromptScorer(
            functools.partial(
                make_prompt_scorer,
                definition=parts.definition,
                specs=parts.specs,
                mesh=parts.mesh,
            )
        )
        self._params: Params = {}
        self._num_blocks = 0
        self._samplers = SamplerPrograms(
            parts.mesh,
            vocab_size=parts.vocab_size,
            max_num_seqs=max_num_seqs,
            dtype=cache_spec.dtype,
        )
        self.sampling_state = SamplingState(max_num_seqs, parts.vocab_size)
        self.compile_seconds: dict[StepShape, float] = {}

    @property
    def largest_shape(self) -> StepShape:
        """The step that needs most memory."""
        return self._buckets.all_shapes()[0]

    @property
    def state_bytes(self) -> int:
        """Block tables, and the logits of two steps in flight, in bytes on one device."""
        table = 4 * self._table_shape[0] * self._table_shape[1]
        itemsize = jnp.dtype(self._cache_spec.dtype).itemsize
        return 2 * table + 2 * self._max_num_seqs * self._parts.vocab_size * itemsize

    def guess_step_bytes(self) -> int:
        """Roughly what ``measure`` will say, from the sizes of a decoder's widest activations."""
        shape, parts = self.largest_shape, self._parts
        itemsize = jnp.dtype(self._cache_spec.dtype).itemsize
        widest = parts.activation_size // parts.mesh.size
        sampler = 5 * 4 * shape.num_rows * parts.vocab_size
        return max(shape.num_tokens * itemsize * widest, sampler)

    def measure(self, num_blocks: int) -> int:
        """Compile the largest programs for a cache of ``num_blocks``.

        Returns:
            The temporaries of the one that needs most, in bytes on one device.
        """
        self._set_num_blocks(num_blocks)
        forward = self.program(self.largest_shape).memory_analysis()
        outputs = forward.output_size_in_bytes - forward.alias_size_in_bytes
        sampler = self._samplers.temp_bytes(self.largest_shape.num_rows)
        return max(forward.temp_size_in_bytes + max(outputs, 0), sampler)

    def compile_all(self, num_blocks: int, *, show_progress: bool) -> None:
        """Compile every step shape, several at a time, so that none compiles during a run.

        Before ``start``: XLA tries out matrix products while there is memory for it.
        """
        self._set_num_blocks(num_blocks)
        shapes = [s for s in self._buckets.all_shapes() if (s, False) not in self._programs]
        if not shapes:
            return
        max_workers = max(1, (os.cpu_count() or 2) - 1)
        with (
            concurrent.futures.ThreadPoolExecutor(max_workers) as pool,
            tqdm(total=len(shapes), desc="Compiling steps", disable=not show_progress) as bar,
        ):
            for _ in pool.map(self.program, shapes):
                bar.update()

    def warm_up_samplers(self) -> None:
        """Compile the samplers of the common variants in the background; returns at once."""
        row_counts = sorted({shape.num_rows for shape in self._buckets.all_shapes()})
        self._samplers.warm_up_in_background(row_counts)

    def start(self, params: Params, num_blocks: int) -> None:
        """Take the weights and allocate the KV cache and the device-side state."""
        self._set_num_blocks(num_blocks)
        self._params = params
        self._allocate_state()

    def restore_state(self) -> None:
        """Make the device-side state anew if a step that failed has taken it along.

        Only when no request runs: what the KV cache held is lost.
        """
        state = (self._caches, self._tables, self._last_tokens)
        if any(array.is_deleted() for array in jax.tree.leaves(state)):
            self._allocate_state()

    def _allocate_state(self) -> None:
        mesh = self._parts.mesh
        self._caches = self._cache_spec.allocate(self._num_blocks, mesh)
        self._tables = jax.device_put(np.zeros(self._table_shape, np.int32), replicated(mesh))
        self._last_tokens = jax.device_put(np.zeros(self._max_num_seqs, np.int32), replicated(mesh))

    def execute(self, step: SchedulerOutput) -> PendingStep:
        """Dispatch a step; returns at once."""
        for request in step.admitted:
            self.sampling_state.set_slot(
                request.slot,
                request.sampling_params,
                request.sampling_params.seed or 0,
                request.prompt_token_ids,
                request.stop_token_ids,
            )
        shape = self._buckets.choose(step.num_scheduled_tokens, len(step.rows))
        variant, layout, sampling = self.sampling_state.build_rows(step.rows, shape.num_rows)
        packed, overflow = self._builder.build(step, shape, is_greedy=variant == GREEDY)
        if overflow is not None:
            self._apply_overflow(overflow)
        scores_prompts = any(map(is_scored, step.rows))
        forward = self.program(shape, scores_prompts)
        self._caches, self._tables, self._last_tokens, token_ids, logits, *hidden = forward(
            self._params, self._caches, self._tables, self._last_tokens, packed
        )
        sampled = SamplerOutput(token_ids, None)
        if variant != GREEDY:
            self._last_tokens, sampled = self._samplers.sample(
                logits, sampling, self._last_tokens, variant=variant, layout=layout
            )
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        scores = self._prompt_scorer.score(step, self._params, *hidden) if scores_prompts else None
        return PendingStep(step, sampled, scores)

    def _apply_overflow(self, updates: TableUpdates) -> None:
        for start in range(0, updates.shape[1], TABLE_UPDATE_SIZE):
            part = updates[:, start : start + TABLE_UPDATE_SIZE]
            padding = TABLE_UPDATE_SIZE - part.shape[1]
            rows_past_the_end = [[self._table_shape[0]], [0], [0]]
            part = np.concatenate([part, np.repeat(rows_past_the_end, padding, axis=1)], axis=1)
            self._tables = apply_table_updates(self._tables, part.astype(np.int32))

    def _set_num_blocks(self, num_blocks: int) -> None:
        if num_blocks != self._num_blocks:
            self._programs.clear()  # the cache's shape is part of every program
            self._num_blocks = num_blocks

    def program(self, shape: StepShape, returns_hidden: bool = False) -> Any:
        """Return the compiled forward step of a shape; compiles it the first time."""
        key = (shape, returns_hidden)
        if key not in self._programs:
            started = time.perf_counter()
            self._programs[key] = self._compile(shape, returns_hidden)
            self.compile_seconds[shape] = time.perf_counter() - started
        return self._programs[key]

    def _compile(self, shape: StepShape, returns_hidden: bool) -> Any:
        mesh, specs = self._parts.mesh, self._parts.specs
        forward = make_forward(
            shape,
            definition=self._parts.definition,
            specs=specs,
            mesh=mesh,
            block_size=self._cache_spec.block_size,
            num_layers=self._cache_spec.num_layers,
            returns_hidden=returns_hidden,
        )

        def ints(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.int32, sharding=replicated(mesh))

        lowered = forward.lower(
            {path: spec.abstract(mesh) for path, spec in specs.items()},
            self._cache_spec.abstract(self._num_blocks, mesh),
            ints(*self._table_shape),
            ints(self._max_num_seqs),
            ints(shape.packed_size),
        )
        platform = mesh.devices.flat[0].platform
        return lowered.compile(compiler_options=compiler_options(shape, platform))
