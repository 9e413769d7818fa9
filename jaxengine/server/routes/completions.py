"""POST /v1/completions."""

import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.server.errors import ApiError
from jaxengine.server.generation import Generation
from jaxengine.server.logprobs import CompletionLogprobsWriter, prompt_logprobs
from jaxengine.server.protocol.common import ErrorResponse
from jaxengine.server.protocol.completions import CompletionRequest, CompletionResponse
from jaxengine.server.request_ids import new_request_id
from jaxengine.server.sampling_fields import check_limits, sampling_params, tokenization_of
from jaxengine.server.state import ServerState, state_of
from jaxengine.server.streaming import EventStream, event, unless_disconnected
from jaxengine.server.usage import UsageCounter, usage_of
from jaxengine.text.prompts import EncodedPrompt

router = APIRouter(tags=["text"])
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 415, 422, 500, 503)
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@router.post("/v1/completions", response_model=CompletionResponse, responses={**ERRORS, **STREAM})
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts."""
    state = state_of(request)
    answer = CompletionAnswer(state, body, new_request_id("cmpl", body.request_id, request))
    prompts = await answer.encode()
    generation = Generation(state, prompts, answer.params, answer.id, body.priority)
    if not body.stream:
        return JSONResponse(await unless_disconnected(request, answer.whole(generation)))
    await generation.__aenter__()  # the status goes out before the stream: errors must be known
    return EventStream(
        answer.stream(generation), keep_alive_s=state.settings.sse_keep_alive_interval
    )


class CompletionAnswer:
    """Writes the answer to one request.

    Args:
        state: The server's.
        body: The request.
        request_id: Its name.

    Raises:
        ApiError: If the request is not possible.
    """

    def __init__(self, state: ServerState, body: CompletionRequest, request_id: str) -> None:
        self.id = request_id
        self._state = state
        self._body = body
        self._model = state.check_model(body.model)
        self._created = int(time.time())
        check_limits(body, state.settings)
        _check_unsupported(body)
        self.params = self._params()
        as_ids = body.return_tokens_as_token_ids
        self._as_ids = state.settings.return_tokens_as_token_ids if as_ids is None else as_ids
        self._writers: dict[int, CompletionLogprobsWriter] = {}

    async def encode(self) -> list[EncodedPrompt]:
        """Bring the prompts into the engine's form.

        Raises:
            ValueError: If one is not possible.
        """
        prompts = _as_list(self._body.prompt)
        limit = self._state.settings.max_completion_prompts
        if not 1 <= len(prompts) <= limit:
            raise ApiError(
                f"prompt holds {len(prompts)} prompts, it may hold 1 to {limit}", param="prompt"
            )
        options = tokenization_of(self._body, add_special_tokens=self._body.add_special_tokens)
        salt = self._body.cache_salt
        return [
            await self._state.llm.encode_prompt(_with_salt(prompt, salt), options)
            for prompt in prompts
        ]

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Wait for all outputs and write them."""
        async with generation:
            outputs = await generation.final()
        choices = [
            self._whole_choice(index * self.params.n + each.index, output, each)
            for index, output in enumerate(outputs)
            for each in output.outputs
        ]
        usage = usage_of(outputs)
        if self._drops_output:
            usage["completion_tokens"], usage["total_tokens"] = 0, usage["prompt_tokens"]
        return {**self._head(), "choices": choices, "usage": usage}

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Write events as tokens come."""
        options = self._body.stream_options
        has_usage = self._state.settings.enable_force_include_usage or bool(
            options and options.include_usage
        )
        is_continuous = bool(has_usage and options and options.continuous_usage_stats)
        usage, head = UsageCounter(), self._head()
        echoed: set[int] = set()
        try:
            async with aclosing(generation.batches()) as batches:
                async for batch in batches:
                    events = []
                    for index, output in batch:
                        usage.add(index, output)
                        for each in output.outputs:
                            choice = self._piece(index, output, each, echoed)
                            chunk = {**head, "choices": [choice]}
                            if is_continuous:
                                chunk["usage"] = usage.values()
                            events.append(event(chunk))
                    yield b"".join(events)
            if has_usage:
                yield event({**head, "choices": [], "usage": usage.values()})
        finally:
            await generation.__aexit__(None, None, None)

    def _params(self) -> SamplingParams:
        body = self._body
        scored = body.prompt_logprobs
        if body.echo and body.logprobs is not None and scored is None:
            scored = body.logprobs
        return sampling_params(
            body,
            self._state.llm.info.sampling_defaults,
            default_max_tokens=16,
            max_tokens=1 if self._drops_output else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=scored,
        )

    @property
    def _drops_output(self) -> bool:
        """Whether the prompt alone is asked about; the engine generates one token at least."""
        return self._body.max_tokens == 0

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }

    def _whole_choice(
        self, number: int, output: RequestOutput, each: CompletionOutput
    ) -> dict[str, Any]:
        drops = self._drops_output
        token_ids = [] if drops else each.token_ids
        entries: list[Any] = [] if drops else list(each.logprobs or ())
        text = "" if drops else each.text
        if self._body.echo:
            text = self._prompt_text(output) + text
        choice = {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(number, output, token_ids, entries, self._body.echo),
            "finish_reason": "length" if drops else each.finish_reason,
            "stop_reason": None if drops else each.stop_reason,
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs)
            if self._body.prompt_logprobs is not None
            else None,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _piece(
        self, index: int, output: RequestOutput, each: CompletionOutput, echoed: set[int]
    ) -> dict[str, Any]:
        number = index * self.params.n + each.index
        is_echo = bool(self._body.echo) and number not in echoed
        echoed.add(number)
        drops = self._drops_output
        token_ids = [] if drops else each.token_ids
        entries: list[Any] = [] if drops else list(each.logprobs or ())
        text = "" if drops else each.text
        choice = {
            "index": number,
            "text": self._prompt_text(output) + text if is_echo else text,
            "logprobs": self._logprobs(number, output, token_ids, entries, is_echo),
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(
        self,
        number: int,
        output: RequestOutput,
        token_ids: Sequence[int],
        entries: list[Any],
        is_echo: bool | None,
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        writer = self._writers.get(number)
        if writer is None:
            writer = CompletionLogprobsWriter(self._body.logprobs, self._as_ids)
            self._writers[number] = writer
        if is_echo and output.prompt_logprobs is not None:
            token_ids = [*output.prompt_token_ids, *token_ids]
            entries = [*output.prompt_logprobs, *entries]
        return writer.write(token_ids, entries)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        tokenizer = self._state.llm.frontend.require_tokenizer()
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _as_list(prompt: Any) -> list[Any]:
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    return [prompt] if is_one else list(prompt)


def _with_salt(prompt: Any, salt: str | None) -> dict[str, Any]:
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    value = prompt if isinstance(prompt, str) else array("i", prompt)
    return {key: value} if salt is None else {key: value, "cache_salt": salt}


def _check_unsupported(body: CompletionRequest) -> None:
    if body.suffix:
        raise ApiError("suffix is not supported: write the whole prompt", param="suffix")
    if body.use_beam_search:
        raise ApiError("use_beam_search is not supported by the server", param="use_beam_search")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            "best_of is not supported: ask for n outputs and take the one with the best logprobs",
            param="best_of",
        )
