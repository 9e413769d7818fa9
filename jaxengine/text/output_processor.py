"""Engine outputs (token ids) -> RequestOutput: text, stop strings, logprobs, n outputs as one.

Text is made only for those who read it: with ``detokenize=False`` never, with FINAL_ONLY at
the end unless a stop string must be found before.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxengine.engine.step_news import PromptLogprobs, StepNews
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.output_logprobs import (
    LogprobsBuilder,
    PromptLogprobsList,
    SampleLogprobsList,
    TokenText,
)
from jaxengine.text.output_state import Completion, RequestState
from jaxengine.text.output_text import OutputText
from jaxengine.text.tokenizer import Tokenizer


class EngineRequest(NamedTuple):
    """What to hand to the engine for one of the n outputs."""

    request_id: str
    sampling_params: SamplingParams


class StoppedRequest(NamedTuple):
    """A request of the engine that a stop string has ended."""

    request_id: str
    stop_reason: str


@dataclass(slots=True)
class ProcessedOutputs:
    """News of a step.

    Attributes:
        request_outputs: For the callers.
        stopped: For the engine: it must finish these.
    """

    request_outputs: list[RequestOutput] = field(default_factory=list)
    stopped: list[StoppedRequest] = field(default_factory=list)


class OutputProcessor:
    """Follows every request from its prompt to its last output.

    Args:
        tokenizer: Makes the text; None if no request wants any.
        clock: Seconds, for the metrics.
    """

    def __init__(self, tokenizer: Tokenizer | None, clock: Callable[[], float] = time.time) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._requests: dict[str, RequestState] = {}
        self._completions: dict[str, Completion] = {}  # by the engine's request id

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request still waits for outputs."""
        return bool(self._requests)

    @property
    def unfinished_request_ids(self) -> list[str]:
        """The requests that still wait for outputs."""
        return list(self._requests)

    def add_request(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
    ) -> list[EngineRequest]:
        """Start to follow a request.

        Args:
            request_id: Not that of an unfinished request.
            prompt: Its text, to be given back; None if there is none.
            prompt_token_ids: The prompt.
            params: Its sampling parameters; ``n`` outputs become n requests of the engine,
                the i-th with seed + i.
            arrival_time: On the processor's clock; None is now.

        Returns:
            The requests to add to the engine.

        Raises:
            ValueError: If the id is in use, or text is asked for without a tokenizer.
        """
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use; choose another")
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids without one")
        arrival_time = self._clock() if arrival_time is None else arrival_time
        request = RequestState(request_id, prompt, prompt_token_ids, params, arrival_time)
        prompt_logprobs = params.prompt_logprobs
        if prompt_logprobs is not None:
            builder = LogprobsBuilder(prompt_logprobs, self._token_text(params))
            request.prompt_logprobs = PromptLogprobsList(
                builder, prompt_token_ids, params.flat_logprobs
            )
        self._requests[request_id] = request
        children = _engine_requests(request_id, params)
        for index, child in enumerate(children):
            completion = self._new_completion(request, index, child)
            request.completions.append(completion)
            self._completions[child.request_id] = completion
        return children

    def abort(self, request_id: str) -> list[str]:
        """Forget a request; no further outputs come for it.

        Returns:
            The engine's requests to abort; none if the id is unknown.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        ids = [c.request_id for c in request.completions if c.finish_reason is None]
        for child_id in ids:
            del self._completions[child_id]
        return ids

    def request_of(self, child_id: str) -> str | None:
        """Return the request that one of the engine's requests belongs to; None if unknown."""
        completion = self._completions.get(child_id)
        return None if completion is None else completion.request.request_id

    def end_early(self, request_id: str) -> tuple[RequestOutput, list[str]]:
        """Abort a request for which somebody still waits.

        Returns:
            Its last output, with what there is so far, and the engine's requests to abort.

        Raises:
            KeyError: If there is no such request.
        """
        request = self._requests[request_id]
        child_ids = self.abort(request_id)
        for completion in request.completions:
            completion.end_early()
        request.num_unfinished = 0
        return request.take_output(self._clock()), child_ids

    def process(self, news: StepNews) -> ProcessedOutputs:
        """Turn the news of a step into outputs.

        Args:
            news: From the engine; unknown (aborted, stopped) requests are left out.
        """
        now = self._clock()
        for chunk in news.prompt_logprobs:
            self._add_prompt_logprobs(chunk)
        processed = ProcessedOutputs()
        changed: dict[str, RequestState] = {}
        for output in news.outputs:
            completion = self._completions.get(output.request_id)
            if completion is None:
                continue
            request = completion.request
            stop_string = completion.add(output)
            if stop_string is not None and output.finish_reason is None:
                processed.stopped.append(StoppedRequest(output.request_id, stop_string))
            request.record(output, now)
            if completion.finish_reason is not None:
                del self._completions[output.request_id]
                request.num_unfinished -= 1
            if request.num_unfinished == 0 or not request.is_final_only:
                changed[request.request_id] = request
        for request in changed.values():
            processed.request_outputs.append(request.take_output(now))
            if request.num_unfinished == 0:
                del self._requests[request.request_id]
        return processed

    def _add_prompt_logprobs(self, chunk: PromptLogprobs) -> None:
        completion = self._completions.get(chunk.request_id)
        if completion is None or completion.index > 0:
            return  # all n outputs share the prompt
        if completion.request.prompt_logprobs is not None:
            completion.request.prompt_logprobs.add_chunk(chunk.rows, chunk.start)

    def _new_completion(
        self, request: RequestState, index: int, child: EngineRequest
    ) -> Completion:
        params = child.sampling_params
        text = None
        if params.detokenize and self._tokenizer is not None:
            detokenizer = self._tokenizer.detokenizer(
                request.prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
            text = OutputText(detokenizer, params)
        logprobs = None
        if params.num_logprobs is not None:
            extra_ids = params.logprob_token_ids or ()
            builder = LogprobsBuilder(params.num_logprobs, self._token_text(params), extra_ids)
            logprobs = SampleLogprobsList(builder, request.prompt_token_ids, params.flat_logprobs)
        return Completion(child.request_id, index, request, text, logprobs)

    def _token_text(self, params: SamplingParams) -> TokenText | None:
        if self._tokenizer is None or not params.detokenize:
            return None
        return self._tokenizer.token_text


def _engine_requests(request_id: str, params: SamplingParams) -> list[EngineRequest]:
    if params.n == 1:
        return [EngineRequest(request_id, params)]
    return [
        EngineRequest(f"{index}_{request_id}", params.for_output(index))
        for index in range(params.n)
    ]
