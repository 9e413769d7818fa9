"""TokenConstraint: what the engine asks of anything that restricts a request's next token."""

from typing import Protocol

import numpy as np


class TokenConstraint(Protocol):
    """Follows one output token by token, and says which tokens may come next.

    Knows nothing of the device. The engine gives it every token of the output, in order.
    """

    @property
    def num_tokens(self) -> int:
        """How many tokens it was given."""

    @property
    def is_terminated(self) -> bool:
        """Whether only end tokens may follow."""

    @property
    def error(self) -> str | None:
        """Why it can no longer say what may follow; None if it can."""

    def accept(self, token_id: int) -> None:
        """Take in the next token of the output. One that is not allowed is an ``error``."""

    def fill(self, row: np.ndarray) -> None:
        """Say which tokens may follow.

        Args:
            row: [ceil(V/32)] int32, overwritten: bit ``i % 32`` of word ``i // 32`` is 1 if token
                ``i`` may follow. After the end, or an error, only end tokens may.
        """

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest tokens."""


def num_mask_words(vocab_size: int) -> int:
    """Length of a row of a mask, in words of 32 bits."""
    return -(-vocab_size // 32)


def allow_all(row: np.ndarray) -> None:
    """Let every token follow."""
    row.fill(-1)


def allow_only(row: np.ndarray, token_id: int) -> None:
    """Let a single token follow."""
    row.fill(0)
    allow_also(row, token_id)


def allow_also(row: np.ndarray, token_id: int) -> None:
    """Let a token follow beside those that may already."""
    row.view(np.uint32)[token_id // 32] |= np.uint32(1 << (token_id % 32))
