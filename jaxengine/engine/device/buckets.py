"""The padded step sizes: the only file that decides what XLA compiles.

A step is padded up to the next size, so few programs serve every batch. Each program costs about
two seconds of start-up on a GPU; sizes are close together only where a step's time grows with them.
"""

import bisect

from jaxengine.batch import StepShape

FITTED_TOKENS = 1024  # a GPU's steps from here on take a time that grows with their tokens
LARGEST_MIXED_ROWS = 256  # the largest step is the most frequent one, so it has rows to choose from
SMALL_MIXED_ROWS = 32  # most prefill steps carry few rows; padding them to all rows costs logits
LARGE_MIXED_TOKENS = 4096  # from here on the logits of all rows cost less than another program


class Buckets:
    """The step shapes of an engine.

    Args:
        max_num_seqs: Most rows of a step.
        max_num_batched_tokens: Most tokens of a step.
        min_mixed_tokens: Smallest size of a step that prefills. On a GPU a step of few tokens
            takes as long as one of 64: it waits for the weights.
        min_decode_rows: Smallest size of a step that only decodes. On a GPU one row takes longer
            than 8 (Qwen3-0.6B: 1.97 against 1.32 ms): XLA makes no matrix products of it.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        min_mixed_tokens: int,
        min_decode_rows: int = 1,
    ) -> None:
        self.decode_rows = decode_sizes(max_num_seqs, min_decode_rows)
        self.mixed_tokens = mixed_sizes(min_mixed_tokens, max_num_batched_tokens)
        self.max_num_seqs = max_num_seqs

    def choose(self, num_tokens: int, num_rows: int) -> StepShape:
        """Return the smallest shape that holds a step."""
        if num_tokens == num_rows:
            rows = self.decode_rows[bisect.bisect_left(self.decode_rows, num_rows)]
            return StepShape(rows, rows, decode_only=True)
        tokens = self.mixed_tokens[bisect.bisect_left(self.mixed_tokens, num_tokens)]
        rows = next(r for r in self._row_choices(tokens) if r >= num_rows)
        return StepShape(tokens, rows, decode_only=False)

    def _row_choices(self, tokens: int) -> list[int]:
        most = min(tokens, self.max_num_seqs)
        if tokens >= LARGE_MIXED_TOKENS:
            is_chosen = tokens == self.mixed_tokens[-1] and most >= 2 * LARGEST_MIXED_ROWS
            return [LARGEST_MIXED_ROWS, most] if is_chosen else [most]
        return [most] if most <= 4 * SMALL_MIXED_ROWS else [SMALL_MIXED_ROWS, most]

    @property
    def fitted_tokens(self) -> list[int]:
        """Sizes of prefilling steps that it pays to fill."""
        return [tokens for tokens in self.mixed_tokens if tokens >= FITTED_TOKENS]

    @property
    def row_counts(self) -> list[int]:
        """Every number of rows that a step can have, the smallest first."""
        return sorted({shape.num_rows for shape in self.all_shapes()})

    def all_shapes(self) -> list[StepShape]:
        """Every shape that ``choose`` can return, the largest (the one that needs most) first."""
        mixed = [
            StepShape(tokens, rows, decode_only=False)
            for tokens in self.mixed_tokens
            for rows in self._row_choices(tokens)
        ]
        decode = [StepShape(rows, rows, decode_only=True) for rows in self.decode_rows]
        return sorted(mixed, key=_size, reverse=True) + sorted(decode, key=_size, reverse=True)


def _size(shape: StepShape) -> tuple[int, int]:
    return shape.num_tokens, shape.num_rows


def decode_sizes(max_num_seqs: int, min_rows: int = 1) -> list[int]:
    """Row counts: powers of two to 64, where a step waits for the weights, then closer together."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256]
    sizes += range(384, max_num_seqs, 128)
    return [size for size in sizes if min_rows <= size < max_num_seqs] + [max_num_seqs]


def mixed_sizes(min_tokens: int, max_tokens: int) -> list[int]:
    """Token counts: powers of two; the scheduler fills long steps to the last one."""
    sizes = []
    size = min_tokens
    while size < max_tokens:
        sizes.append(size)
        size *= 2
    return [*sizes, max_tokens]
