"""SamplingParams -> TokenConstraint: the one place that knows tokenizer, grammars and reasoning."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.compiler import COMPILE_TIMEOUT_S, GrammarCompiler
from jaxengine.structured.constraint import TokenConstraint
from jaxengine.structured.reasoning import REASONING_MARKERS, ReasoningConstraint, markers_of
from jaxengine.structured.token_vocabulary import build_token_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ConstraintFactory:
    """Makes the constraints of one model's requests.

    Args:
        hf_tokenizer: A fast tokenizer.
        vocab_size: Of the model.
        eos_token_ids: Tokens that end an output.
        reasoning_parser: Name of the parser of the model's reasoning; empty if it does not
            reason. A grammar applies behind the reasoning then.
        compile_timeout_s: Longest wait for a grammar.

    Raises:
        ValueError: If the reasoning parser is not known.
    """

    def __init__(
        self,
        hf_tokenizer: "PreTrainedTokenizerFast",
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        reasoning_parser: str = "",
        compile_timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> None:
        self._hf_tokenizer = hf_tokenizer
        self._markers = markers_of(reasoning_parser)
        self.compiler = GrammarCompiler(
            lambda: build_token_vocabulary(hf_tokenizer, vocab_size, eos_token_ids),
            timeout_s=compile_timeout_s,
        )

    def prepare(self, params: SamplingParams) -> None:
        """Begin to compile what a request will need; returns at once."""
        if params.structured_outputs is not None:
            self.compiler.submit(params.structured_outputs)

    def maker(
        self, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> Callable[[], TokenConstraint | None]:
        """Return what makes the constraint of each of a request's outputs.

        Waits for the compiler, so call it off the engine's thread or after ``prepare`` is done.

        Raises:
            ValueError: If the grammar cannot be compiled (in time), or the request limits
                reasoning of a model that does not reason.
        """
        budget = params.thinking_token_budget
        grammar = None
        if params.structured_outputs is not None:
            grammar = self.compiler.compile(params.structured_outputs)
        if self._markers is None:
            if budget is not None:
                raise ValueError(
                    "thinking_token_budget needs to know how the model marks its reasoning: set "
                    f"--reasoning-parser to one of {', '.join(REASONING_MARKERS)}"
                )
            return (lambda: None) if grammar is None else grammar.new_state
        if grammar is None and budget is None:
            return lambda: None
        marker_ids: dict[str, Any] = {
            "start_ids": self._encode(self._markers.start),
            "end_ids": self._encode(self._markers.end),
            "forced_ids": self._encode(self._markers.forced_end or self._markers.end),
        }
        return lambda: ReasoningConstraint(
            prompt_token_ids=prompt_token_ids,
            budget=budget,
            grammar=None if grammar is None else grammar.new_state(),
            **marker_ids,
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._hf_tokenizer.encode(text, add_special_tokens=False)) if text else []
