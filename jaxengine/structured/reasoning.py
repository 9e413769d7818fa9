"""ReasoningConstraint: a limit on the tokens of the model's reasoning, and a grammar behind it.

An output is reasoning up to its end marker, then content. The grammar applies to the content only;
when the reasoning has used up its budget, the end marker is forced, token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxengine.structured.constraint import allow_all, allow_also, allow_only
from jaxengine.structured.grammar_state import GrammarState


@dataclass(frozen=True)
class ReasoningMarkers:
    """What begins and ends reasoning, as text.

    Attributes:
        start: Begins it; many chat templates have written it already. Empty: an output always
            begins with reasoning.
        end: Ends it.
        forced_end: What to write to end it at any place; None for ``end``.
    """

    start: str
    end: str
    forced_end: str | None = None


THINK = ReasoningMarkers("<think>", "</think>")
HARMONY = ReasoningMarkers(
    "",
    "<|channel|>final<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
)
MAX_TAIL = 4  # tokens that a chat template may write behind an end marker: line ends
# By the name of the reasoning parser.
REASONING_MARKERS = {
    "deepseek_r1": THINK,
    "qwen3": THINK,
    "think": THINK,
    "gpt_oss": HARMONY,
    "openai_gptoss": HARMONY,
}


def markers_of(reasoning_parser: str) -> ReasoningMarkers | None:
    """Return what the model of a reasoning parser writes; None for an empty name.

    Raises:
        ValueError: If there is no such parser.
    """
    if not reasoning_parser:
        return None
    if reasoning_parser not in REASONING_MARKERS:
        raise ValueError(
            f"reasoning_parser is {reasoning_parser!r}; known are {', '.join(REASONING_MARKERS)}"
        )
    return REASONING_MARKERS[reasoning_parser]


class ReasoningConstraint:
    """Follows reasoning and what comes after it: a ``TokenConstraint``.

    Args:
        start_ids: Tokens of the start marker; if there are none, the output begins with reasoning.
        end_ids: Tokens of the end marker.
        prompt_token_ids: What comes before. Reasoning that it leaves open goes on in the output;
            one that it closes right at its end (a model told not to think) is over.
        forced_ids: What to force when the budget is used up; None for the end marker.
        budget: Most tokens of reasoning; None for no limit. 0 ends it at once.
        grammar: What the content must obey; None for nothing.
    """

    def __init__(
        self,
        start_ids: Sequence[int],
        end_ids: Sequence[int],
        prompt_token_ids: Sequence[int],
        *,
        forced_ids: Sequence[int] | None = None,
        budget: int | None = None,
        grammar: GrammarState | None = None,
    ) -> None:
        self._start_ids, self._end_ids = list(start_ids), list(end_ids)
        self._forced_ids = self._end_ids if forced_ids is None else list(forced_ids)
        self._budget = budget
        self._grammar = grammar
        self._tokens: list[int] = []
        self._first_phase = self._phase_after(prompt_token_ids)
        self._restart()

    @property
    def num_tokens(self) -> int:
        """How many tokens it was given."""
        return len(self._tokens)

    @property
    def is_terminated(self) -> bool:
        """Whether only end tokens may follow."""
        return self._is_content and self._grammar is not None and self._grammar.is_terminated

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on; None if it can, or there is none."""
        return None if self._grammar is None else self._grammar.error

    @property
    def deciding_grammar(self) -> GrammarState | None:
        """The grammar, if it alone decides what may follow."""
        return self._grammar if self._is_content else None

    def accept(self, token_id: int) -> None:
        """Take in the next token of the output."""
        self._tokens.append(token_id)
        self._move(token_id, is_replay=False)

    def fill(self, row: np.ndarray) -> None:
        """Say which tokens may follow; ``row`` is [ceil(V/32)] int32, overwritten."""
        if self._phase == "forcing":
            allow_only(row, self._forced_ids[self._num_forced])
        elif self._phase == "reasoning" or self._grammar is None:
            allow_all(row)
        else:
            self._grammar.fill(row)
            if self._phase == "start":
                allow_also(row, self._start_ids[0])

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest tokens."""
        assert 0 <= num_tokens <= len(self._tokens), "more tokens than were given"
        num_before = self._num_content_tokens
        del self._tokens[len(self._tokens) - num_tokens :]
        self._restart()
        for token_id in self._tokens:
            self._move(token_id, is_replay=True)
        if self._grammar is not None:
            self._grammar.rollback(num_before - self._num_content_tokens)

    @property
    def _is_content(self) -> bool:
        return self._phase == "content"

    def _phase_after(self, prompt_token_ids: Sequence[int]) -> str:
        started = _last_index(prompt_token_ids, self._start_ids)
        ended = _last_index(prompt_token_ids, self._end_ids)
        if started > ended:
            return "reasoning"
        num_behind = len(prompt_token_ids) - ended - len(self._end_ids)
        return "content" if ended >= 0 and num_behind <= MAX_TAIL else "start"

    def _restart(self) -> None:
        self._num_reasoning_tokens = 0
        self._num_content_tokens = 0
        self._num_forced = 0  # tokens of the end marker that were forced
        self._newest: list[int] = []  # as many as the end marker has
        self._enter(self._first_phase)

    def _enter(self, phase: str) -> None:
        """Phases: start (nothing yet), reasoning, forcing (its end), content."""
        self._phase = phase
        self._end_if_used_up()

    def _end_if_used_up(self) -> None:
        is_used_up = self._budget is not None and self._num_reasoning_tokens >= self._budget
        if self._phase == "reasoning" and is_used_up:
            self._phase = "forcing"

    def _move(self, token_id: int, *, is_replay: bool) -> None:
        if self._phase == "start":
            begins = token_id == self._start_ids[0]
            self._enter("reasoning" if begins else "content")
            if begins:
                return
        if self._phase == "content":
            self._num_content_tokens += 1
            if self._grammar is not None and not is_replay:
                self._grammar.accept(token_id)
        elif self._phase == "forcing":
            self._num_forced += 1
            if self._num_forced == len(self._forced_ids):
                self._phase = "content"
        else:
            self._reason(token_id)

    def _reason(self, token_id: int) -> None:
        self._num_reasoning_tokens += 1
        self._newest = [*self._newest, token_id][-len(self._end_ids) :]
        if self._newest == self._end_ids:
            self._phase = "content"
        else:
            self._end_if_used_up()


def _last_index(token_ids: Sequence[int], marker: Sequence[int]) -> int:
    """Where a marker last begins; -1 if nowhere. An empty one begins at the end."""
    width = len(marker)
    for index in range(len(token_ids) - width, -1, -1):
        if not width or (
            token_ids[index] == marker[0] and list(token_ids[index : index + width]) == marker
        ):
            return index
    return -1
