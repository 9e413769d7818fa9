"""What is known of an unfinished request: its n outputs as they grow."""

from dataclasses import dataclass, field

from jaxengine.engine.scheduling.request import FinishReason
from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput
from jaxengine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.text.output_logprobs import PromptLogprobsList, SampleLogprobsList
from jaxengine.text.output_text import OutputText


@dataclass(slots=True, eq=False)
class Completion:
    """One of the n outputs as it grows.

    Attributes:
        request_id: Name of the engine's request.
        request: The prompt it belongs to.
        text: None if no text is wanted.
        logprobs: None if none are wanted.
        num_sent: Tokens that the caller has seen.
        is_new: Whether there are tokens, or an end, that the caller has not seen.
    """

    request_id: str
    index: int
    request: "RequestState"
    text: OutputText | None
    logprobs: SampleLogprobsList | None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_sent: int = 0
    is_new: bool = False

    def add(self, output: EngineCoreOutput) -> str | None:
        """Take in new tokens; returns the stop string that they complete."""
        self.is_new = True
        self.token_ids += output.new_token_ids
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if self.logprobs is not None and output.logprobs is not None:
            for row, token_id in enumerate(output.new_token_ids):
                self.logprobs.append(output.logprobs, row, token_id)
        if self.text is None:
            return None
        stop_string = self.text.add(output.new_token_ids, len(self.token_ids), output.finish_reason)
        if stop_string is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop_string
        return stop_string

    def end_early(self) -> None:
        """End the output where it is, unless it has ended."""
        if self.finish_reason is not None:
            return
        self.finish_reason, self.is_new = FinishReason.ABORT, True
        if self.text is not None:
            self.text.add([], len(self.token_ids), FinishReason.ABORT)

    def take_output(self, kind: RequestOutputKind) -> CompletionOutput:
        """Return the completion so far, or what is new in it."""
        self.is_new = False
        start = self.num_sent if kind is RequestOutputKind.DELTA else 0
        self.num_sent = len(self.token_ids)
        reason, logprobs = self.finish_reason, self.logprobs
        text = ""
        if self.text is not None:
            text = self.text.take(is_delta=kind is RequestOutputKind.DELTA, is_final=bool(reason))
        return CompletionOutput(
            self.index,
            text,
            self.token_ids[start:],
            None if logprobs is None else logprobs.cumulative,
            None if logprobs is None else logprobs.entries[start:],
            None if reason is None else reason.value,
            self.stop_reason,
        )


class RequestState:
    """A prompt and its n outputs."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_time: float,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.kind = params.output_kind
        self.is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self.completions: list[Completion] = []
        self.num_unfinished = params.n
        self.prompt_logprobs: PromptLogprobsList | None = None
        self.metrics = RequestMetrics(arrival_time)
        self.num_cached_tokens: int | None = None

    def record(self, output: EngineCoreOutput, now: float) -> None:
        """Keep what the metrics need."""
        metrics = self.metrics
        if self.num_cached_tokens is None:
            self.num_cached_tokens = output.num_cached_tokens
        if output.new_token_ids:
            metrics.num_generation_tokens += len(output.new_token_ids)
            metrics.last_token_time = now
            if metrics.first_token_time is None:
                metrics.first_token_time = now
                metrics.first_scheduled_time = output.first_scheduled_time

    def take_output(self, now: float) -> RequestOutput:
        """Return the request's outputs so far, or what is new in them, in index order."""
        is_delta = self.kind is RequestOutputKind.DELTA
        outputs = [
            completion.take_output(self.kind)
            for completion in self.completions
            if completion.is_new or not is_delta
        ]
        finished = self.num_unfinished == 0
        if finished:
            self.metrics.finished_time = now
        prompt_logprobs = self.prompt_logprobs
        if is_delta:
            self.prompt_logprobs = None  # sent once
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            None if prompt_logprobs is None else prompt_logprobs.entries,
            outputs,
            finished,
            self.metrics,
            self.num_cached_tokens,
        )
