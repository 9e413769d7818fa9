"""GrammarState: where one output stands in its grammar."""

import llguidance
import numpy as np


class CompiledGrammar:
    """A grammar of a model's vocabulary; immutable, shared by its requests.

    Args:
        matcher: At the beginning of the grammar; kept, never advanced.
        num_words: Length of a mask of the tokenizer's vocabulary, in words of 32 bits.
    """

    def __init__(self, matcher: llguidance.LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def new_state(self) -> "GrammarState":
        """Return the beginning of an output."""
        return GrammarState(self._matcher.deep_copy(), self._num_words)


class GrammarState:
    """Follows one output through a grammar: a ``TokenConstraint``.

    Args:
        matcher: At the beginning; owned from now on.
        num_words: Length of a mask of the tokenizer's vocabulary, in words of 32 bits.
    """

    def __init__(self, matcher: llguidance.LLMatcher, num_words: int) -> None:
        self.matcher = matcher
        self._num_words = num_words
        self._num_tokens = 0
        self._num_after_end = 0  # tokens that came after the end, which the matcher never saw

    @property
    def num_tokens(self) -> int:
        """How many tokens it was given."""
        return self._num_tokens

    @property
    def num_words(self) -> int:
        """Length of its masks, in words of 32 bits: of the tokenizer's vocabulary."""
        return self._num_words

    @property
    def is_terminated(self) -> bool:
        """Whether only end tokens may follow."""
        return self.matcher.is_stopped()

    @property
    def is_accepting(self) -> bool:
        """Whether the output may end here."""
        return self.matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on; None if it can."""
        if not self.matcher.is_error():
            return None
        return self.matcher.get_error().splitlines()[0]

    def accept(self, token_id: int) -> None:
        """Take in the next token of the output."""
        self._num_tokens += 1
        if self.matcher.is_stopped():
            self._num_after_end += 1
        else:
            self.matcher.consume_token(token_id)

    def fill(self, row: np.ndarray) -> None:
        """Say which tokens may follow; ``row`` is [ceil(V/32)] int32, overwritten."""
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.int32)
        row[:] = mask[: len(row)]

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest tokens."""
        assert 0 <= num_tokens <= self._num_tokens, "more tokens than were given"
        self._num_tokens -= num_tokens
        num_unseen = min(num_tokens, self._num_after_end)
        self._num_after_end -= num_unseen
        if num_tokens > num_unseen:
            self.matcher.rollback(num_tokens - num_unseen)
