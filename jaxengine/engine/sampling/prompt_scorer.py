"""Logprobs of prompt tokens, for the requests that ask for them.

A row's share of its prompt is scored in the step that computes it; the tokens come packed as the
step has them, so chunked prefill needs no special case.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxengine.engine.device.step_inputs import ScoringInputs
from jaxengine.engine.sampling.logprobs import TokenLogprobs
from jaxengine.engine.sampling.sampling_inputs import LOGPROB_BUCKETS
from jaxengine.engine.scheduling.scheduler_output import ScheduledRow, SchedulerOutput

WHOLE_VOCABULARY = -1


@dataclasses.dataclass(frozen=True)
class PromptChunk:
    """Where a step's arrays hold a part of one prompt.

    Attributes:
        request_id: Whose prompt.
        start: Index in the prompt of the first token scored; at least 1.
        tokens: The packed query tokens that score it and those behind it.
    """

    request_id: str
    start: int
    tokens: slice


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """A step's prompt logprobs: device arrays over its packed tokens, and whose they are."""

    arrays: TokenLogprobs
    chunks: list[PromptChunk]

    @classmethod
    def of(cls, step: SchedulerOutput, arrays: TokenLogprobs) -> "PromptScores":
        """Say whose the scores of a step's packed tokens are."""
        return cls(arrays, [chunk for chunk, _ in _chunks(step)])

    def on_host(self) -> list[tuple[PromptChunk, TokenLogprobs]]:
        """Wait for the arrays; return each chunk with its part of them."""
        arrays = jax.tree.map(np.asarray, self.arrays)
        return [
            (chunk, jax.tree.map(lambda x, tokens=chunk.tokens: x[tokens], arrays))
            for chunk in self.chunks
        ]


class PromptScorer:
    """Scores the prompts of a step.

    Args:
        make_program: Gives the jitted scorer for a number of logprobs.
    """

    def __init__(self, make_program: Callable[[int], Callable]) -> None:
        self._make_program = make_program
        self._programs: dict[int, Callable] = {}

    def score(self, inputs: ScoringInputs, params: Any, hidden: jax.Array) -> TokenLogprobs:
        """Dispatch the scoring of a step's packed tokens.

        Args:
            inputs: From ``scoring_inputs``.
            params: The last stage's parameters.
            hidden: [T, D] output of the last layer.
        """
        program = self._programs.get(inputs.num_logprobs)
        if program is None:
            program = self._make_program(inputs.num_logprobs)
            self._programs[inputs.num_logprobs] = program
        return program(params, hidden, inputs.next_ids)


def scoring_inputs(step: SchedulerOutput, num_tokens: int) -> ScoringInputs:
    """Collect what scores every prompt token in a step of ``num_tokens`` padded tokens."""
    wanted = [r.request.sampling_params.prompt_logprobs for r in step.rows if is_scored(r)]
    next_ids = np.zeros(num_tokens, np.int32)
    for chunk, ids in _chunks(step):
        next_ids[chunk.tokens] = ids
    return ScoringInputs(_bucket([number for number in wanted if number is not None]), next_ids)


def is_scored(row: ScheduledRow) -> bool:
    """Whether the step computes prompt tokens whose successors are to be scored."""
    request = row.request
    return (
        request.sampling_params.prompt_logprobs is not None
        and row.num_computed_tokens < request.num_prompt_tokens - 1
    )


def _bucket(wanted: list[int]) -> int:
    if WHOLE_VOCABULARY in wanted:
        return WHOLE_VOCABULARY
    most = max(wanted)
    return next((size for size in LOGPROB_BUCKETS if size >= most), most)


def _chunks(step: SchedulerOutput) -> Iterator[tuple[PromptChunk, Sequence[int]]]:
    """Each scored part of a prompt, and the tokens behind its tokens."""
    first = 0
    for row in step.rows:
        if is_scored(row):
            start = row.num_computed_tokens + 1
            ids = row.request.prompt_token_ids[start : start + row.num_scheduled_tokens]
            tokens = slice(first, first + len(ids))
            yield PromptChunk(row.request.request_id, start, tokens), ids
        first += row.num_scheduled_tokens
