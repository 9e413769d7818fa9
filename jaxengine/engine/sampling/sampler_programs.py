"""The compiled samplers: one for each variant and number of rows.

Greedy batches need none, the forward step takes the most likely token itself. The variants that
most requests ask for are compiled while the engine rests, or behind the first requests that sample;
any other one when it is needed. What was compiled is kept on disk beside the steps.
"""

import itertools
import logging
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxengine.engine.device.compiler_options import compiler_options
from jaxengine.engine.device.program_cache import ProgramCache, compile_lowered
from jaxengine.engine.sampling.sampler import SamplerOutput, sample_packed
from jaxengine.engine.sampling.sampling_inputs import MASK_BUCKETS, PackedLayout, SamplerVariant
from jaxengine.sharding import LOGITS_SPEC, replicated
from jaxengine.structured.constraint import num_mask_words

logger = logging.getLogger(__name__)

COMMON_VARIANTS = (
    SamplerVariant(random=True),
    SamplerVariant(random=True, top_p=True),
    SamplerVariant(random=True, small_top_k=True, only_small_top_k=True, top_p=True),
)
# What most structured outputs ask for: compiled last, beside one such request or a few.
MASKED_VARIANTS = (
    SamplerVariant(num_masks=MASK_BUCKETS[0]),
    SamplerVariant(random=True, num_masks=MASK_BUCKETS[0]),
)
# Looks at the whole vocabulary in every way there is: what the memory account reckons with.
LARGEST_VARIANT = SamplerVariant(random=True, top_k=True, top_p=True, min_p=True, num_history=32768)


IDLE_S = 0.2  # an engine that has not made a step for so long has nothing to do
MAX_WAIT_S = 2.0  # before a program is compiled beside an engine that samples and never rests


class SamplerPrograms:
    """Compiles samplers and keeps them.

    Args:
        mesh: Devices that hold the logits, each its part of the vocabulary.
        vocab_size: V.
        max_num_seqs: Length of ``last_tokens``.
        dtype: Of the logits.
        program_cache: Keeps the compiled samplers between runs; None for jax's own cache alone.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        vocab_size: int,
        max_num_seqs: int,
        dtype: str,
        program_cache: ProgramCache | None = None,
    ) -> None:
        self._mesh = mesh
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._dtype = jnp.dtype(dtype)
        self._programs: dict[tuple[SamplerVariant, int], jax.stages.Compiled] = {}
        self._program_cache = program_cache
        self._last_step = -IDLE_S
        self._first_sampled = float("inf")  # when some request was sampled first

    def note_step(self) -> None:
        """Say that the engine is at work: compiling in the background gives way."""
        self._last_step = time.monotonic()

    def warm_up_in_background(self, row_counts: Sequence[int]) -> None:
        """Compile the common variants in a thread; a process that ends waits for one at most."""
        threading.Thread(target=self._warm_up, args=(row_counts,), name="warm-up").start()

    def _warm_up(self, row_counts: Sequence[int]) -> None:
        masked_counts = [count for count in row_counts if count >= MASK_BUCKETS[0]]
        for variants, counts in ((COMMON_VARIANTS, row_counts), (MASKED_VARIANTS, masked_counts)):
            for num_rows, variant in itertools.product(counts, variants):
                self._wait_for_a_pause()
                if not threading.main_thread().is_alive():
                    return
                self._program(variant, num_rows)

    def _wait_for_a_pause(self) -> None:
        """Let a busy engine go first: tracing holds the interpreter, which each step needs.

        (Qwen3-0.6B, the first request after the start: 1.9 s beside this thread, 0.34 s without.)
        An engine whose requests are all greedy needs no sampler: it is not disturbed at all.
        """
        began = time.monotonic()
        while (now := time.monotonic()) - self._last_step < IDLE_S:
            if now - max(began, self._first_sampled) >= MAX_WAIT_S:
                return
            if not threading.main_thread().is_alive():
                return
            time.sleep(IDLE_S / 4)

    def temp_bytes(self, num_rows: int) -> int:
        """Temporaries of the largest sampler, as XLA reports them."""
        analysis = self._program(LARGEST_VARIANT, num_rows).memory_analysis()
        return 0 if analysis is None else int(analysis.temp_size_in_bytes)

    def sample(
        self,
        logits: jax.Array,
        packed: np.ndarray,
        last_tokens: jax.Array,
        masks: np.ndarray | None = None,
        *,
        variant: SamplerVariant,
    ) -> tuple[jax.Array, SamplerOutput]:
        """Dispatch the sampler of a batch; ``last_tokens`` is donated."""
        self._first_sampled = min(self._first_sampled, time.monotonic())
        program = self._programs.get((variant, logits.shape[0]))
        if program is None:
            logger.debug("compiling a sampler of %d rows for %s", logits.shape[0], variant)
            program = self._program(variant, logits.shape[0])
        return program(logits, packed, last_tokens, *([] if masks is None else [masks]))

    def _program(self, variant: SamplerVariant, num_rows: int) -> jax.stages.Compiled:
        key = (variant, num_rows)
        if key not in self._programs:
            self._programs[key] = self._load_or_compile(variant, num_rows)
        return self._programs[key]

    def _load_or_compile(self, variant: SamplerVariant, num_rows: int) -> jax.stages.Compiled:
        cache = self._program_cache
        facts = (variant, num_rows, self._vocab_size, self._dtype.name, self._max_num_seqs)
        if cache is not None and (program := cache.load(facts)) is not None:
            return program
        options = compiler_options(self._mesh.devices.flat[0].platform)
        program, is_storable = compile_lowered(self._lower(variant, num_rows), options)
        if cache is not None and is_storable:
            cache.store(facts, program)
        return program

    def _lower(self, variant: SamplerVariant, num_rows: int) -> jax.stages.Lowered:
        layout = PackedLayout.of(variant, num_rows)
        sharding = replicated(self._mesh)
        logits_sharding = NamedSharding(self._mesh, LOGITS_SPEC)
        logits = (num_rows, self._vocab_size)
        masks = (variant.num_masks, num_mask_words(self._vocab_size))
        return sample_packed.lower(
            jax.ShapeDtypeStruct(logits, self._dtype, sharding=logits_sharding),
            jax.ShapeDtypeStruct((layout.size,), jnp.int32, sharding=sharding),
            jax.ShapeDtypeStruct((self._max_num_seqs,), jnp.int32, sharding=sharding),
            *[jax.ShapeDtypeStruct(masks, jnp.int32, sharding=sharding)][: variant.num_masks],
            layout=layout,
            variant=variant,
            sharding=sharding if self._mesh.size > 1 else None,
        )
