"""Random prompts of chosen lengths, and when they arrive."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RandomWorkload:
    """Lengths of a benchmark's requests, in tokens.

    Attributes:
        num_prompts: Requests.
        input_len: Tokens of a prompt behind the common prefix.
        output_len: Tokens of an output.
        range_ratio: Lengths are drawn evenly from ``length * (1 - ratio)`` to
            ``length * (1 + ratio)``; from 0 to below 1.
        prefix_len: Tokens that all prompts begin with.
        seed: Of lengths and tokens.
    """

    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, lowest in (
            *(("num_prompts", 1), ("input_len", 1), ("output_len", 1)),
            *(("prefix_len", 0), ("seed", 0)),
        ):
            if getattr(self, name) < lowest:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}: it must be at least {lowest}")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"--random-range-ratio is {self.range_ratio}: 0 to below 1 is needed")

    def draw(self, token_ids: Sequence[int]) -> list[tuple[list[int], int]]:
        """Return each request's prompt ids and output length.

        Args:
            token_ids: Those that prompts may be made of.
        """
        rng = np.random.default_rng(self.seed)
        inputs = self._lengths(rng, self.input_len)
        outputs = self._lengths(rng, self.output_len)
        prefix, *prompts = random_prompts([self.prefix_len, *inputs], len(token_ids), self.seed)
        return [
            ([token_ids[index] for index in (*prefix, *prompt)], output)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def _lengths(self, rng: np.random.Generator, length: int) -> list[int]:
        low = max(1, int(np.floor(length * (1 - self.range_ratio))))
        high = int(np.ceil(length * (1 + self.range_ratio)))
        return rng.integers(low, high + 1, self.num_prompts).tolist()


def random_prompts(lengths: Sequence[int], num_tokens: int, seed: int = 0) -> list[list[int]]:
    """Return lists of random numbers below ``num_tokens``, drawn one list after the other."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, num_tokens, length).tolist() for length in lengths]


def arrival_times(
    num_requests: int, request_rate: float, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Return the seconds after the start at which requests are sent.

    Args:
        num_requests: How many.
        request_rate: Requests a second, on average; infinity sends all at once.
        burstiness: Shape of the gaps' gamma law: 1 is a Poisson process, less comes in bursts.
        seed: Of the gaps.

    Raises:
        ValueError: If a number is not above 0.
    """
    for flag, value in (("--request-rate", request_rate), ("--burstiness", burstiness)):
        if not value > 0:
            raise ValueError(f"{flag} is {value}: it must be above 0")
    if np.isinf(request_rate):
        return [0.0] * num_requests
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1 / (request_rate * burstiness), num_requests)
    return (np.cumsum(gaps) - gaps[0]).tolist()
