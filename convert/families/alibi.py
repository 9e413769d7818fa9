"""Slopes of linear biases on attention scores.

Source: ALiBi, arXiv:2108.12409, section 3; for a number of heads that is no power of two, the
authors' code takes every other slope of twice the power below for the remaining ones.
"""

from __future__ import annotations


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> tuple[float, ...]:
    """A positive slope for each head.

    Args:
        num_heads: N.
        max_bias: The last of a power of two heads has 2 ** -max_bias.
    """
    closest = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(closest, max_bias)
    if closest < num_heads:
        slopes += _geometric(2 * closest, max_bias)[::2][: num_heads - closest]
    return tuple(slopes)


def _geometric(count: int, max_bias: float) -> list[float]:
    return [2.0 ** (-max_bias * (i + 1) / count) for i in range(count)]
