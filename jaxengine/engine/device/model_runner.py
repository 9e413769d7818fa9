"""ModelRunner: turns a SchedulerOutput into device programs, stage by stage, and these into tokens.

It never waits for the devices: ``execute`` returns a PendingStep whose tokens are read later.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxengine.batch import StepShape
from jaxengine.engine.device.batch_builder import BatchBuilder, packed_views
from jaxengine.engine.device.buckets import Buckets
from jaxengine.engine.device.compiler_options import compiles_slowly
from jaxengine.engine.device.program_cache import jax_cache_only_read
from jaxengine.engine.device.stage import CompiledStep, Stage
from jaxengine.engine.device.stage_link import StageLink
from jaxengine.engine.device.step import ForwardOutputs, make_prompt_scorer
from jaxengine.engine.device.step_inputs import StepInputs
from jaxengine.engine.garbage_collection import paused_garbage_collection
from jaxengine.engine.sampling.logprobs import TokenLogprobs
from jaxengine.engine.sampling.prompt_scorer import (
    PromptScorer,
    PromptScores,
    is_scored,
    scoring_inputs,
)
from jaxengine.engine.sampling.sampler import SamplerOutput
from jaxengine.engine.sampling.sampler_programs import SamplerPrograms
from jaxengine.engine.sampling.sampling_inputs import GREEDY, SamplingState
from jaxengine.engine.scheduling.scheduler_output import SchedulerOutput
from jaxengine.weights import Params

INT32_MAX = 2**31 - 1

# Returns the masks [num_masks, ceil(V/32)] of the rows of a step that have one, in their order.
FillMasks = Callable[[SchedulerOutput, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """A dispatched step's results, still on the device.

    Attributes:
        sampled: Token ids [B] (and logprobs) of the padded rows.
        prompt_scores: Logprobs of the packed tokens' successors; None if no prompt is scored.
    """

    sampled: SamplerOutput
    prompt_scores: TokenLogprobs | None


def _nothing(*_: object) -> None:
    pass


def _wait(array: jax.Array) -> None:
    array.block_until_ready()


@dataclasses.dataclass(frozen=True)
class RunnerHooks:
    """Where another module can take part: several hosts run one model in step.

    Attributes:
        on_dispatch: Called with every step's inputs before it is dispatched.
        on_masks: Called with the masks of a step's sampling, after its other inputs.
        on_restore: Called before the device-side state is made anew.
        wait: Returns when an array is there, or raises if it will never be.
        agree_on_blocks: Maps the KV blocks that this process has room for to those of all.
    """

    on_dispatch: Callable[[StepInputs], None] = _nothing
    on_masks: Callable[[np.ndarray], None] = _nothing
    on_restore: Callable[[], None] = _nothing
    wait: Callable[[jax.Array], None] = _wait
    agree_on_blocks: Callable[[int], int] = int


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A dispatched step: what was scheduled, and its tokens, still on the device.

    Attributes:
        sampled: Token ids [B] (and logprobs) of the padded rows.
        prompt_scores: Logprobs of prompt tokens; None if no row wants any.
        wait: Returns when an array is there, or raises if it will never be.
    """

    scheduler_output: SchedulerOutput
    sampled: SamplerOutput
    prompt_scores: PromptScores | None
    wait: Callable[[jax.Array], None] = _wait

    def token_ids(self) -> np.ndarray:
        """Wait for the step and return the token ids of its real rows."""
        self.wait(self.sampled.token_ids)
        return np.asarray(self.sampled.token_ids)[: len(self.scheduler_output.rows)]

    def logprobs(self) -> TokenLogprobs | None:
        """Wait for the step and return its rows' logprobs; None if no row wants any."""
        return jax.tree.map(np.asarray, self.sampled.logprobs)


class ModelRunner:
    """Runs steps through the pipeline stages of one model.

    Args:
        stages: In the order of the layers. Each works on another step at the same time.
        buckets: The padded step sizes.
        vocab_size: V.
        activation_size: Numbers a token needs at the widest place of a layer, about.
        max_num_seqs: Slots of device-side state.
        max_in_flight: Most steps dispatched before the first one's tokens are read.
        hooks: For what drives the runners of other hosts.
        logprobs_mode: As ``EngineConfig`` has it.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        buckets: Buckets,
        vocab_size: int,
        activation_size: int,
        max_num_seqs: int,
        max_in_flight: int,
        hooks: RunnerHooks,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        self.stages = list(stages)
        self.max_in_flight = max_in_flight
        self._hooks = hooks
        # Brings each stage the output of the one before; the first, the tokens of the last.
        self._links = [
            StageLink(self.stages[number - 1].parts.mesh, stage.parts.mesh)
            for number, stage in enumerate(self.stages)
        ]
        self._buckets = buckets
        self._builder = BatchBuilder(max_num_seqs)
        self._vocab_size = vocab_size
        self._activation_size = activation_size
        self._max_num_seqs = max_num_seqs
        last = self.stages[-1]
        self._prompt_scorer = PromptScorer(functools.partial(make_prompt_scorer, parts=last.parts))
        self._samplers = SamplerPrograms(
            last.parts.mesh,
            vocab_size=vocab_size,
            max_num_seqs=max_num_seqs,
            dtype=last.cache_spec.dtype,
            program_cache=last.program_cache,
        )
        self.sampling_state = SamplingState(max_num_seqs, vocab_size, logprobs_mode)
        # Steps whose tokens the last stage has and the first one has not: targets and token ids.
        # Of more than max_in_flight steps the host knows the tokens and sends them.
        self._unstored: collections.deque = collections.deque(maxlen=max_in_flight)
        # The same on the scheduling side: the slots of each.
        self._unstored_slots: collections.deque = collections.deque(maxlen=max_in_flight)
        self._step_numbers = itertools.count(1)  # never those of another scheduler's steps

    @property
    def compile_seconds(self) -> dict[StepShape, float]:
        """Seconds that each shape's programs took, over all stages."""
        seconds: collections.Counter[StepShape] = collections.Counter()
        for stage in self.stages:
            seconds.update(stage.compile_seconds)
        return dict(seconds)

    @property
    def fitted_step_tokens(self) -> list[int]:
        """Padded sizes of prefilling steps that it pays to fill."""
        return self._buckets.fitted_tokens

    @property
    def largest_shape(self) -> StepShape:
        """The step that needs most memory."""
        return self._buckets.all_shapes()[0]

    def state_bytes(self, stage: Stage) -> int:
        """Block tables, inboxes, and after the last stage logits that live between steps."""
        num_bytes = stage.peer_bytes + stage.table_bytes
        if not stage.parts.is_last:
            return num_bytes
        itemsize = jnp.dtype(stage.cache_spec.dtype).itemsize
        width = self._vocab_size // stage.parts.mesh.size
        if (buffers := stage.output_buffers) is not None:
            num_bytes += buffers.num_bytes(self._buckets.row_counts)
        if buffers is None or not buffers.serves(self._max_num_seqs):
            num_bytes += 2 * self._max_num_seqs * width * itemsize
        return num_bytes

    def guess_step_bytes(self, stage: Stage) -> int:
        """Roughly what ``measure`` will say, from the sizes of a decoder's widest activations."""
        shape = self.largest_shape
        itemsize = jnp.dtype(stage.cache_spec.dtype).itemsize
        activations = shape.num_tokens * itemsize * self._activation_size // stage.parts.mesh.size
        sampler = 5 * 4 * shape.num_rows * self._vocab_size if stage.parts.is_last else 0
        return max(activations, sampler)

    def measure(self, stage: Stage) -> int:
        """Return what a stage's largest program needs, in bytes on one device."""
        needed = stage.step_bytes(self.largest_shape)
        if stage.parts.is_last:
            needed = max(needed, self._samplers.temp_bytes(self.largest_shape.num_rows))
        return needed

    def set_num_blocks(self, num_blocks: int) -> None:
        """Decide the size of the KV cache; programs compiled for another one are dropped."""
        for stage in self.stages:
            stage.set_num_blocks(num_blocks)

    def compile_all(self, *, show_progress: bool) -> None:
        """Load or compile every step shape, so that none compiles during a run.

        This thread traces, which needs the interpreter, and the others are with XLA, which does
        not. What holds the interpreter too, writing programs to the disk, waits until all is
        traced. What takes XLA longest goes first, or the start would end with waiting for it.

        Before ``start``: XLA tries out matrix products while there is memory for it.
        """
        programs = [
            (stage, shape)
            for shape in self._buckets.all_shapes()
            for stage in self.stages
            if not stage.has_program(shape)
        ]
        if not programs:
            return
        max_workers = max(1, (os.cpu_count() or 2) - 1)
        is_kept = all(stage.program_cache is not None for stage in self.stages)
        with (
            jax_cache_only_read() if is_kept else contextlib.nullcontext(),
            concurrent.futures.ThreadPoolExecutor(max_workers) as pool,
            tqdm(total=len(programs), desc="Compiling steps", disable=not show_progress) as bar,
        ):
            is_loaded = pool.map(lambda program: program[0].load(program[1]), programs)
            missing = [p for p, is_there in zip(programs, is_loaded, strict=True) if not is_there]
            bar.update(len(programs) - len(missing))
            if not missing:
                return
            missing.sort(key=lambda program: not compiles_slowly(program[1].num_tokens))
            compiling: dict[concurrent.futures.Future[CompiledStep], Stage] = {}
            with paused_garbage_collection():
                for stage, shape in missing:
                    future = pool.submit(stage.compile, stage.lower(shape))
                    future.add_done_callback(lambda _: bar.update())
                    compiling[future] = stage
            for future in concurrent.futures.as_completed(compiling):
                compiling[future].keep(future.result())

    def warm_up_samplers(self) -> None:
        """Compile the samplers of the common variants in the background; returns at once."""
        self._samplers.warm_up_in_background(self._buckets.row_counts)

    def start(self, params: Sequence[Params]) -> None:
        """Take each stage's weights and allocate the KV cache and the device-side state."""
        for stage, own in zip(self.stages, params, strict=True):
            stage.start(own)
            if stage.output_buffers is not None:
                stage.output_buffers.allocate(self._buckets.row_counts)

    def restore_state(self) -> None:
        """Make the device-side state anew if a step that failed has taken it along.

        Only when no request runs: what the KV cache held is lost.
        """
        self._hooks.on_restore()
        self._unstored.clear()
        self._unstored_slots.clear()
        for stage in self.stages:
            stage.restore_state()

    def execute(self, step: SchedulerOutput, fill_masks: FillMasks | None = None) -> PendingStep:
        """Dispatch a step; returns at once, or when the masks are there.

        Args:
            step: What was scheduled.
            fill_masks: Called between the forward programs and the sampler, if a row has a
                constraint: it may wait for the tokens of earlier steps, beside the forward.
        """
        inputs = self.prepare(step)
        self._hooks.on_dispatch(inputs)

        def masks() -> np.ndarray:
            assert fill_masks is not None, "a request with a constraint, and no masks"
            filled = fill_masks(step, inputs.variant.num_masks)
            self._hooks.on_masks(filled)
            return filled

        outputs = self.dispatch(inputs, masks)
        scores = None
        if outputs.prompt_scores is not None:
            scores = PromptScores.of(step, outputs.prompt_scores)
        return PendingStep(step, outputs.sampled, scores, self._hooks.wait)

    def prepare(self, step: SchedulerOutput) -> StepInputs:
        """Translate what was scheduled; to be called once a step, in order."""
        for request in step.admitted:
            self.sampling_state.set_slot(
                request.slot,
                request.sampling_params,
                request.sampling_params.seed or 0,
                request.prompt_token_ids,
                request.end_token_ids,
                is_masked=request.constraint is not None,
            )
        shape = self._buckets.choose(step.num_scheduled_tokens, len(step.rows))
        variant, _, sampling = self.sampling_state.build_rows(step.rows, shape.num_rows)
        packed, overflow = self._builder.build(step, shape, is_greedy=variant == GREEDY)
        parts = packed_views(shape, packed)
        parts["step_number"][0] = next(self._step_numbers) & INT32_MAX
        targets = np.where(parts["samples_token"] > 0, parts["slots"], self._max_num_seqs)
        targets = targets.astype(np.int32)
        scores_prompts = any(map(is_scored, step.rows))
        return StepInputs(
            shape=shape,
            packed=packed,
            table_updates=overflow,
            variant=variant,
            sampling=sampling,
            scoring=scoring_inputs(step, shape.num_tokens) if scores_prompts else None,
            token_targets=targets,
            num_token_stores=self._count_token_stores(step, targets),
        )

    def _count_token_stores(self, step: SchedulerOutput, targets: np.ndarray) -> int:
        """How many of the unstored steps this one needs: up to the last that sampled for it."""
        if len(self.stages) == 1:
            return 0
        read = {row.request.slot for row in step.rows if row.is_token_on_device}
        unstored = self._unstored_slots
        needed = [i + 1 for i, slots in enumerate(unstored) if not read.isdisjoint(slots)]
        count = max(needed, default=0)
        for _ in range(count):
            unstored.popleft()
        unstored.append(set(targets.tolist()))
        return count

    def dispatch(self, inputs: StepInputs, masks: Callable[[], np.ndarray]) -> StepOutputs:
        """Launch a step's programs; returns at once.

        Args:
            inputs: Of the step.
            masks: Called before the sampler is launched, if the step's sampling needs masks.
        """
        self._samplers.note_step()
        shape, is_scored = inputs.shape, inputs.scoring is not None
        self._store_tokens(inputs.num_token_stores)
        hidden: jax.Array | None = None
        for stage, link in zip(self.stages, self._links, strict=True):
            if inputs.table_updates is not None:
                stage.apply_overflow(inputs.table_updates)
            if hidden is not None:
                hidden = link(hidden)
            outputs = stage.run(
                shape,
                inputs.packed,
                hidden,
                returns_hidden=is_scored and stage.parts.is_last,
            )
            hidden = outputs.hidden
        sampled = self._sample(inputs, masks, outputs)
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        if len(self.stages) > 1:
            self._unstored.append((inputs.token_targets, sampled.token_ids))
        scores = None
        if inputs.scoring is not None:
            last = self.stages[-1]
            scores = self._prompt_scorer.score(inputs.scoring, last.params, outputs.hidden)
        return StepOutputs(sampled, scores)

    def _sample(
        self,
        inputs: StepInputs,
        masks: Callable[[], np.ndarray],
        outputs: ForwardOutputs,
    ) -> SamplerOutput:
        if inputs.variant == GREEDY:
            return SamplerOutput(outputs.token_ids, None)
        last = self.stages[-1]
        filled = masks() if inputs.variant.num_masks else None
        last_tokens, sampled = self._samplers.sample(
            outputs.logits, inputs.sampling, last.state.last_tokens, filled, variant=inputs.variant
        )
        last.keep_last_tokens(last_tokens)
        return sampled

    def _store_tokens(self, count: int) -> None:
        """Bring sampled tokens from the last stage to the first.

        As late as possible: the first stage's devices wait here for the last stage, so only a
        step that needs the tokens may do it.
        """
        first = self.stages[0]
        for _ in range(count):
            targets, token_ids = self._unstored.popleft()
            first.store_tokens(targets, self._links[0](token_ids))
