"""Beam search over an engine that samples: one token a round for every beam of every prompt.

A round asks the engine for the 2 x beam_width most likely next tokens of each beam; the prefix
cache has what the beams share, so a round computes one token a beam. Of the candidates that do not
end, the best beam_width go on; those that end with an end token are complete.

Source: the rules are those of vLLM's ``LLM.beam_search``, with the length penalty of transformers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxengine.outputs import Logprob, RequestOutput
from jaxengine.sampling_params import MAX_NUM_SEQS_PER_PROMPT, SamplingParams


@dataclasses.dataclass(kw_only=True)
class BeamSearchParams:
    """What a beam search looks for.

    Args:
        beam_width: How many beams go on after each round, and how many come back.
        max_tokens: Most tokens of an output.
        ignore_eos: Go on behind end tokens.
        temperature: Above 0 a token sampled at it is a candidate besides; beams are compared by
            the untouched probabilities in any case.
        length_penalty: The sum of a beam's logprobs is divided by its number of tokens to this
            power: above 0 favours long outputs.
        include_stop_str_in_output: Keep the end token in the text, if special tokens are kept.
        skip_special_tokens: Leave special tokens out of the text.
        allowed_token_ids: The only tokens that beams may hold.
        structured_outputs: Must be None.

    Raises:
        ValueError: If a value is outside its bounds.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, highest in (("beam_width", MAX_NUM_SEQS_PER_PROMPT), ("max_tokens", 2**63)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= highest:
                raise ValueError(f"{name} must be an integer from 1 to {highest}, got {value!r}")
        if self.structured_outputs is not None:
            raise ValueError("beam search has no structured_outputs: use LLM.generate for them")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty; use None to allow all tokens")


@dataclasses.dataclass
class BeamSearchSequence:
    """A beam.

    Attributes:
        tokens: Prompt and output.
        logprobs: The candidates of each of its tokens.
        cum_logprob: Sum over its tokens.
        text: Prompt and output as text; None while it grows.
        finish_reason: "stop" if it ended with an end token, else "length".
        stop_reason: The end token.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None


@dataclasses.dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclasses.dataclass
class _Search:
    """The search of one prompt."""

    num_prompt_tokens: int
    beams: list[BeamSearchSequence]
    completed: list[BeamSearchSequence] = dataclasses.field(default_factory=list)


NextTokens = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


def beam_search(
    prompts: Sequence[Sequence[int]],
    params: BeamSearchParams,
    *,
    next_tokens: NextTokens,
    eos_token_ids: frozenset[int],
    max_model_len: int,
) -> list[list[BeamSearchSequence]]:
    """Search for the most likely outputs of each prompt.

    Args:
        prompts: Token ids.
        params: What is looked for.
        next_tokens: Generates for token ids, one output each, in their order.
        eos_token_ids: Tokens that complete a beam.
        max_model_len: Longest beam, prompt and output.

    Returns:
        At most ``beam_width`` beams a prompt, best first, without their texts.
    """
    searches = [_Search(len(prompt), [BeamSearchSequence(list(prompt), [])]) for prompt in prompts]
    ends = frozenset() if params.ignore_eos else eos_token_ids
    sampling = _round_params(params)
    for _ in range(params.max_tokens):
        beams = [beam for search in searches for beam in search.beams]
        if not beams:
            break
        outputs = iter(next_tokens([beam.tokens for beam in beams], sampling))
        for search in searches:
            steps = [next(outputs).outputs[0].logprobs for _ in search.beams]
            _advance(search, [step[0] for step in steps if step], params, ends)
            if search.beams and len(search.beams[0].tokens) >= max_model_len:
                search.completed += search.beams  # all are of one length
                search.beams = []
    return [_best(search, params) for search in searches]


def _round_params(params: BeamSearchParams) -> SamplingParams:
    """What to ask of the engine for each beam: scores are of the untouched distribution."""
    logprobs = None if params.allowed_token_ids else 2 * params.beam_width
    return SamplingParams(
        max_tokens=1,
        temperature=params.temperature,
        logprobs=logprobs,
        logprob_token_ids=params.allowed_token_ids,
        detokenize=False,
    )


def _advance(
    search: _Search,
    candidates_of: list[dict[int, Logprob]],
    params: BeamSearchParams,
    ends: frozenset[int],
) -> None:
    """Replace the beams by the best of their continuations."""
    allowed = params.allowed_token_ids
    continued = []
    for beam, candidates in zip(search.beams, candidates_of, strict=True):
        for token_id, candidate in candidates.items():
            if allowed is not None and token_id not in allowed:
                continue  # the sampled one, which is always among them
            grown = BeamSearchSequence(
                [*beam.tokens, token_id],
                [*beam.logprobs, candidates],
                beam.cum_logprob + candidate.logprob,
            )
            if token_id in ends:
                grown.finish_reason, grown.stop_reason = "stop", token_id
                search.completed.append(grown)
            else:
                continued.append(grown)
    search.beams = _sorted(search, continued, params)[: params.beam_width]


def _best(search: _Search, params: BeamSearchParams) -> list[BeamSearchSequence]:
    for beam in search.completed + search.beams:
        beam.finish_reason = beam.finish_reason or "length"
    return _sorted(search, search.completed + search.beams, params)[: params.beam_width]


def _sorted(
    search: _Search, beams: list[BeamSearchSequence], params: BeamSearchParams
) -> list[BeamSearchSequence]:
    def score(beam: BeamSearchSequence) -> float:
        num_tokens = len(beam.tokens) - search.num_prompt_tokens
        return beam.cum_logprob / num_tokens**params.length_penalty

    return sorted(beams, key=score, reverse=True)  # stable: equals stay in the order of the beams
