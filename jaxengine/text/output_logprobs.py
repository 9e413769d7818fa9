"""Logprob arrays of a step -> the dictionaries of ``CompletionOutput``."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from jaxengine.engine.step_news import LogprobRows
from jaxengine.outputs import FlatLogprobs, Logprob, PromptLogprobs, SampleLogprobs

TokenText = Callable[[int, Sequence[int]], str]  # of a token behind others
NUM_CONTEXT_TOKENS = 6  # a character can be split over four tokens


class LogprobsBuilder:
    """Builds one dictionary per token: the token itself first, then the most likely ones.

    Args:
        num_logprobs: How many of the most likely; -1 is the whole vocabulary.
        token_text: Text of a token; None without a tokenizer.
        extra_ids: Tokens to score besides.
    """

    def __init__(
        self, num_logprobs: int, token_text: TokenText | None, extra_ids: Sequence[int] = ()
    ) -> None:
        self._num_logprobs = num_logprobs
        self._token_text = token_text
        self._extra_ids = list(extra_ids)

    def build(
        self, arrays: LogprobRows, row: int, token_id: int, context: Sequence[int] = ()
    ) -> dict[int, Logprob]:
        """Return token id -> Logprob for one row.

        Args:
            arrays: Of a step.
            row: One of their rows.
            token_id: The row's token.
            context: The tokens before it.
        """
        logprob = float(arrays.logprob[row])
        entries = {token_id: self._entry(token_id, logprob, int(arrays.rank[row]), context)}
        if self._num_logprobs:
            ids, values = self._top(arrays, row)
            for index, (top_id, value) in enumerate(zip(ids, values, strict=True)):
                if top_id not in entries:
                    entries[top_id] = self._entry(top_id, value, index + 1, context)
        if self._extra_ids and arrays.id_logprobs is not None:
            scores = arrays.id_logprobs[row][: len(self._extra_ids)].tolist()
            for extra_id, value in zip(self._extra_ids, scores, strict=True):
                if extra_id not in entries:
                    entries[extra_id] = self._entry(extra_id, value, None, context)
        return entries

    def _top(self, arrays: LogprobRows, row: int) -> tuple[list[int], list[float]]:
        values = arrays.top_logprobs[row]
        count = len(values) if self._num_logprobs == -1 else self._num_logprobs
        if arrays.top_ids is not None:
            return arrays.top_ids[row, :count].tolist(), values[:count].tolist()
        ids = np.argsort(-values, kind="stable")[:count]  # of the whole vocabulary
        return ids.tolist(), values[ids].tolist()

    def _entry(
        self, token_id: int, logprob: float, rank: int | None, context: Sequence[int]
    ) -> Logprob:
        text = None if self._token_text is None else self._token_text(token_id, context)
        return Logprob(logprob, rank, text)


class SampleLogprobsList:
    """Logprobs of a growing output.

    Args:
        builder: Builds the entries.
        prompt_token_ids: The prompt, which may have begun the first token's character.
        is_flat: Keep them as ``FlatLogprobs``.

    Attributes:
        cumulative: Sum of the logprobs of all its tokens.
        entries: One dictionary per token.
    """

    def __init__(
        self,
        builder: LogprobsBuilder,
        prompt_token_ids: Sequence[int] = (),
        is_flat: bool = False,
    ) -> None:
        self._builder = builder
        self._context = deque(prompt_token_ids[-NUM_CONTEXT_TOKENS:], NUM_CONTEXT_TOKENS)
        self.cumulative = 0.0
        self.entries: SampleLogprobs = FlatLogprobs() if is_flat else []

    def append(self, arrays: LogprobRows, row: int, token_id: int) -> None:
        """Add the entry of a sampled token, that of a row."""
        entry = self._builder.build(arrays, row, token_id, tuple(self._context))
        self._context.append(token_id)
        self.cumulative += entry[token_id].logprob
        self.entries.append(entry)


class PromptLogprobsList:
    """Logprobs of a prompt, which arrive in chunks as it is computed.

    Args:
        builder: Builds the entries.
        prompt_token_ids: The prompt.
        is_flat: Give them as ``FlatLogprobs``.
    """

    def __init__(
        self, builder: LogprobsBuilder, prompt_token_ids: Sequence[int], is_flat: bool = False
    ) -> None:
        self._builder = builder
        self._prompt_token_ids = prompt_token_ids
        self._entries: list[dict[int, Logprob] | None] = [None] * len(prompt_token_ids)
        self._is_flat = is_flat

    @property
    def entries(self) -> PromptLogprobs:
        """One dictionary per token, the first None."""
        return FlatLogprobs(self._entries) if self._is_flat else self._entries

    def add_chunk(self, arrays: LogprobRows, start: int) -> None:
        """Take in the logprobs of consecutive prompt tokens.

        Args:
            arrays: Row r scores prompt token ``start + r``.
            start: At least 1: nothing comes before the first token. A chunk that comes
                again, after a preemption, replaces the one before.
        """
        for row in range(len(arrays.logprob)):
            index = start + row
            token_id = self._prompt_token_ids[index]
            context = self._prompt_token_ids[max(0, index - NUM_CONTEXT_TOKENS) : index]
            self._entries[index] = self._builder.build(arrays, row, token_id, context)
