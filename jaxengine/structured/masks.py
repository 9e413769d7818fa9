"""Fills the masks of a step: grammars side by side in the library's threads, the others in turn."""

import functools
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par

from jaxengine.structured.constraint import TokenConstraint
from jaxengine.structured.grammar_state import GrammarState
from jaxengine.structured.reasoning import ReasoningConstraint


def fill_masks(constraints: Sequence[TokenConstraint], masks: np.ndarray) -> None:
    """Fill row ``i`` with the tokens that constraint ``i`` allows next.

    Args:
        constraints: Each of another request.
        masks: [at least as many, ceil(V/32)] int32; further rows are left as they are.
    """
    grammars = []
    for index, constraint in enumerate(constraints):
        deciding = _deciding_grammar(constraint)
        if deciding is None:
            constraint.fill(masks[index])
        else:
            grammars.append((deciding, index))
    if len(grammars) == 1 or not _fits(grammars, masks):
        for grammar, index in grammars:
            grammar.fill(masks[index])
    elif grammars:
        matchers = [(grammar.matcher, index) for grammar, index in grammars]
        fill_next_token_bitmask_par(_executor(), matchers, masks)


def _deciding_grammar(constraint: TokenConstraint) -> GrammarState | None:
    """The grammar that alone decides what may follow, if there is one."""
    if isinstance(constraint, ReasoningConstraint):
        return constraint.deciding_grammar
    return constraint if isinstance(constraint, GrammarState) else None


def _fits(grammars: Sequence[tuple[GrammarState, int]], masks: np.ndarray) -> bool:
    """Whether the library may write rows of this length: not if the tokenizer has more tokens."""
    return all(grammar.num_words == masks.shape[1] for grammar, _ in grammars)


@functools.cache
def _executor() -> LLExecutor:
    return LLExecutor()
