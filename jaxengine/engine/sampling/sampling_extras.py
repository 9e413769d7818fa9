"""Sampling parameters that need lists: penalties, biases, bad words, allowed tokens.

A slot that uses none of them has no ``SlotExtras`` and costs nothing per step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxengine.sampling_params import SamplingParams

PROMPT_TOKEN = 1 << 20  # history value of a token of the prompt; outputs count 1 each

# Group of lists -> its fields. Entries are int32 arrays [len(fields), n]; floats by their bits.
LIST_FIELDS = {
    "history": ("history_rows", "history_tokens", "history_values"),
    "biases": ("bias_rows", "bias_tokens", "bias_values"),
    "bad_words": ("bad_rows", "bad_previous", "bad_tokens"),
    "allowed": ("allowed_rows", "allowed_tokens"),
}
Entries = dict[str, list[np.ndarray]]


def needs_extras(params: SamplingParams) -> bool:
    """Say whether a request uses any parameter that is sent as a list."""
    return bool(
        params.has_penalties
        or params.logit_bias
        or params.min_tokens
        or params.bad_words_token_ids
        or params.allowed_token_ids
        or params.logprob_token_ids
    )


class SlotExtras:
    """The lists of one request, as far as they do not change from step to step.

    Args:
        params: The request's sampling parameters.
        prompt_token_ids: Its prompt.
        end_token_ids: Tokens masked until ``min_tokens`` are there.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        end_token_ids: frozenset[int],
    ) -> None:
        self.logprob_token_ids = np.array(params.logprob_token_ids or (), np.int32)
        self._has_penalties = params.has_penalties
        self._num_prompt_tokens = len(prompt_token_ids)
        self._min_tokens = params.min_tokens
        self._bad_words = params.bad_words_token_ids or []
        prompt = np.unique(prompt_token_ids) if params.repetition_penalty != 1.0 else ()
        self._history = _entries(prompt, PROMPT_TOKEN)  # with room behind num_history
        self._num_history = len(prompt)
        self._num_known = self._num_prompt_tokens  # tokens of the request that are in it
        bias = dict(params.logit_bias or {})
        self._bias = _entries(list(bias), _bits(np.array(list(bias.values()), np.float32)))
        self._min_tokens_bias = _entries(sorted(end_token_ids), _bits(np.float32(-np.inf)))
        self._allowed = _entries(params.allowed_token_ids or ())

    @property
    def has_allowed(self) -> bool:
        """Whether only some tokens may be sampled."""
        return self._allowed.shape[1] > 0

    def add_entries(self, entries: Entries, row: int, request: Any, position: int) -> None:
        """Add what the next token of this request depends on.

        Args:
            entries: Lists of the batch so far, by group; added to.
            row: Row of the request in the batch.
            request: The request, for its tokens known on the host.
            position: Index in the sequence of the token to be sampled.
        """
        groups = []
        if self._has_penalties:
            groups.append(("history", self._known_history(request)))
        if self._bias.shape[1]:
            groups.append(("biases", self._bias))
        if position - self._num_prompt_tokens < self._min_tokens:
            groups.append(("biases", self._min_tokens_bias))
        if self._bad_words:
            is_pending = position > len(request.all_token_ids)
            groups.append(("bad_words", self._completed_bad_words(request, is_pending)))
        if self.has_allowed:
            groups.append(("allowed", self._allowed))
        for group, array in groups:
            array = array.copy()
            array[0] = row
            entries.setdefault(group, []).append(array)

    def _known_history(self, request: Any) -> np.ndarray:
        tokens = request.all_token_ids[self._num_known :]
        if len(tokens):
            start, end = self._num_history, self._num_history + len(tokens)
            if end > self._history.shape[1]:
                room = np.zeros((3, 2 * end), np.int32)
                room[:, :start] = self._history[:, :start]
                self._history = room
            self._history[1, start:end] = tokens
            self._history[2, start:end] = 1
            self._num_history = end
            self._num_known += len(tokens)
        return self._history[:, : self._num_history]

    def _completed_bad_words(self, request: Any, is_pending: bool) -> np.ndarray:
        """Bad words of which only the last token is missing, or that and the pending one."""
        longest = max(map(len, self._bad_words))
        known = list(request.all_token_ids[self._num_prompt_tokens :][-longest:])
        found = []
        for *prefix, last in self._bad_words:
            if not prefix:
                found.append((0, -1, last))
            elif is_pending and _ends_with(known, prefix[:-1]):
                found.append((0, prefix[-1], last))
            elif not is_pending and _ends_with(known, prefix):
                found.append((0, -1, last))
        return np.array(found, np.int32).reshape(-1, 3).T


def _ends_with(tokens: list[int], suffix: list[int]) -> bool:
    return not suffix or tokens[-len(suffix) :] == suffix


def _entries(tokens: Sequence[int] | np.ndarray, *values: int | np.ndarray) -> np.ndarray:
    """Array [2 + len(values), n]: the row, filled in later, the tokens, and the values."""
    entries = np.zeros((2 + len(values), len(tokens)), np.int32)
    entries[1] = tokens
    for field, value in zip(entries[2:], values, strict=True):
        field[:] = value
    return entries


def _bits(values: np.ndarray | np.float32) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.int32)
