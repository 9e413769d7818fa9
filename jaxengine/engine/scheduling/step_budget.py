"""How many tokens a step may take, where steps are padded to a few sizes.

A step of 1,100 tokens that is padded to 2,048 takes the device as long as one of 2,048. If it takes
1,024 tokens, and the next step the rest, both together are done in two thirds of that time.
"""

from bisect import bisect_left
from collections.abc import Sequence

# A step is cut down to the size below if it would fill no more of the next one than this. What is
# left over costs a step of its own, which also has to read the weights.
MOST_FILLED = 0.75


def fitted_budget(sizes: Sequence[int], *, num_decodes: int, num_prefill_tokens: int) -> int | None:
    """Return the size that a step should be cut down to.

    Args:
        sizes: Padded sizes of a step, rising; only steps that are larger than the first of them
            are cut down.
        num_decodes: Tokens that requests need to go on; they have a place in any size.
        num_prefill_tokens: Tokens of prompts that could be computed now.

    Returns:
        A size; None to take all tokens. At least half of the prompts' tokens fit into it: they
        are delayed, not starved.
    """
    wanted = num_decodes + num_prefill_tokens
    index = bisect_left(sizes, wanted)
    if not 0 < index < len(sizes) or wanted > MOST_FILLED * sizes[index]:
        return None
    smaller = sizes[index - 1]
    return smaller if 2 * (smaller - num_decodes) >= num_prefill_tokens else None
