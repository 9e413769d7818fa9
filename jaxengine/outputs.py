"""What a caller gets back: the names and fields of vLLM's outputs.

Standard library only.
"""

from collections.abc import Iterable, Mapping, Sequence
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


class FlatLogprobs(Sequence[dict[int, Logprob] | None]):
    """Logprobs of many tokens in a few lists, read like a list of dictionaries.

    A list of dictionaries makes an object an entry, each of which the garbage collector visits;
    this one makes the dictionary of a token when it is read.

    Attributes:
        start_indices: Where the entries of each token begin in the lists below.
        end_indices: Where they end; a token without entries (the first of a prompt) has none.
        token_ids: Of the entries, token after token.
        logprobs: Likewise.
        ranks: Likewise.
        decoded_tokens: Likewise.
    """

    def __init__(self, entries: Iterable[dict[int, Logprob] | None] = ()) -> None:
        self.start_indices: list[int] = []
        self.end_indices: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int | None] = []
        self.decoded_tokens: list[str | None] = []
        for each in entries:
            self.append(each)

    def append(self, entry: dict[int, Logprob] | None) -> None:
        """Add the entries of the next token."""
        self.start_indices.append(len(self.token_ids))
        for token_id, logprob in (entry or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(logprob.logprob)
            self.ranks.append(logprob.rank)
            self.decoded_tokens.append(logprob.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FlatLogprobs(self[each] for each in range(*index.indices(len(self))))
        rows = range(self.start_indices[index], self.end_indices[index])
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in rows
        } or None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


# One entry per token: token id -> Logprob. In a prompt the first entry is None.
SampleLogprobs = list[dict[int, Logprob]] | FlatLogprobs
PromptLogprobs = list[dict[int, Logprob] | None] | FlatLogprobs


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
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0

    @property
    def first_token_latency(self) -> float | None:
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
