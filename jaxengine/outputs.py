"""What a caller gets back: the names and fields of vLLM's outputs.

Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """Log probability of one token, before any sampling parameter changed it.

    Attributes:
        logprob: Natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: The text of the token; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One entry per token: token id -> Logprob. In a prompt the first entry is None.
SampleLogprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` outputs of a prompt.

    Attributes:
        index: Its number, from 0 to n-1.
        text: Generated text; only the new part if the output kind is DELTA.
        token_ids: Generated token ids; likewise.
        cumulative_logprob: Sum over all generated tokens; None if not asked for.
        logprobs: One dict per entry of ``token_ids``; None if not asked for.
        finish_reason: "stop", "length" or "abort"; None while running.
        stop_reason: The stop string or stop token id that ended it; None for the end
            of sequence or another reason.
        lora_request: The adapter used, if any.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        """Whether this output is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of ``time.time`` unless said otherwise.

    Attributes:
        arrival_time: When the request came in.
        first_scheduled_time: When it first ran; None while waiting.
        first_token_time: When its first token reached the caller's side.
        last_token_time: When its newest token did.
        finished_time: When it ended.
        num_generation_tokens: Tokens generated over all outputs.
        num_preemptions: How often its blocks were taken away.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The answer, or the answer so far, to one prompt.

    Attributes:
        request_id: Name of the request.
        prompt: The prompt as text; None if it was given as token ids.
        prompt_token_ids: The prompt as the model sees it.
        prompt_logprobs: One entry per prompt token, the first None; None if not asked.
        outputs: The ``n`` outputs in index order (those that are new, if DELTA).
        finished: Whether all outputs are complete.
        metrics: Times of the request; None if they are not recorded.
        num_cached_tokens: Prompt tokens whose K/V came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    lora_request: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
