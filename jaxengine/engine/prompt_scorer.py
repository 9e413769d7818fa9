"""Logprobs of prompt tokens, for the requests that ask for them.

A row's share of its prompt is scored in the step that computes it; the tokens come packed as the
step has them, so chunked prefill needs no special case.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxengine.engine.logprobs import TokenLogprobs
from jaxengine.engine.sampling_inputs import LOGPROB_BUCKETS
from jaxengine.engine.scheduler_output import ScheduledRow, SchedulerOutput

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

    def score(self, step: SchedulerOutput, params: Any, hidden: jax.Array) -> PromptScores:
        """Dispatch the scoring of every prompt token in the step.

        Args:
            step: What the step computes.
            params: The model's parameters.
            hidden: [T, D] output of the last layer.
        """
        wanted = [r.request.sampling_params.prompt_logprobs for r in step.rows if is_scored(r)]
        count = _bucket([number for number in wanted if number is not None])
        next_ids, chunks = _targets(step, hidden.shape[0])
        program = self._programs.get(count)
        if program is None:
            program = self._programs[count] = self._make_program(count)
        return PromptScores(program(params, hidden, next_ids), chunks)


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


def _targets(step: SchedulerOutput, num_tokens: int) -> tuple[np.ndarray, list[PromptChunk]]:
    next_ids = np.zeros(num_tokens, np.int32)
    chunks, first = [], 0
    for row in step.rows:
        if is_scored(row):
            start = row.num_computed_tokens + 1
            ids = row.request.prompt_token_ids[start : start + row.num_scheduled_tokens]
            tokens = slice(first, first + len(ids))
            next_ids[tokens] = ids
            chunks.append(PromptChunk(row.request.request_id, start, tokens))
        first += row.num_scheduled_tokens
    return next_ids, chunks
