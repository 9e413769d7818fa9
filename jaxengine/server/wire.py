"""Messages between the engine's process and those of HTTP, as bytes: msgpack, never pickle.

A message is a list: its kind, then values. Both sides have the same version of this package, but a
wrong message is refused all the same: nothing in it is executed.
"""

import dataclasses
import functools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from jaxengine.engine.scheduling.request import FinishReason
from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput, SchedulerStats
from jaxengine.engine.step_news import LogprobRows, PromptLogprobs, StepNews
from jaxengine.engine_client import EngineInfo, EngineNews, EngineRequest
from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.params import StructuredOutputsParams

MAX_MESSAGE_BYTES = 1 << 30
DTYPES = ("int32", "float32")
FINISH_REASONS = tuple(FinishReason)
# What the engine does not look at.
_TEXT_FIELDS = ("output_kind", "stop", "guided_decoding", "bad_words", "extra_args")

Message = list[Any]


class WireError(ValueError):
    """What came is no message of ours."""


def pack(message: Sequence[Any]) -> bytes:
    """Return a message as bytes."""
    return msgpack.packb(message, use_bin_type=True)


def unpack(data: bytes | memoryview) -> Message:
    """Return the message of some bytes.

    Raises:
        WireError: If they are none.
    """
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except Exception as error:  # msgpack raises almost any type here
        raise WireError(f"a message cannot be read: {error!r:.200}") from None
    if not isinstance(message, list) or not message or not isinstance(message[0], str):
        raise WireError(f"a message is a list that begins with its kind, got {message!r:.200}")
    return message


# Requests, from a front end to the engine.


def encode_request(number: int, request: EngineRequest) -> Message:
    """Write a request; the engine knows it by the number."""
    prompt = np.frombuffer(request.prompt_token_ids, np.int32)
    return [
        number,
        prompt.astype("<i4", copy=False).tobytes(),
        _encode_params(request.params),
        request.priority,
        request.cache_salt,
    ]


def decode_request(name: str, values: Sequence[Any]) -> EngineRequest:
    """Read what ``encode_request`` has written.

    Raises:
        WireError: If it is something else.
        ValueError: If the parameters are not possible.
    """
    match values:
        case [int(), bytes(prompt), dict(params), int(priority), str() | None as salt]:
            token_ids = array("i", np.frombuffer(prompt, "<i4").astype(np.int32).tobytes())
            return EngineRequest(name, token_ids, _decode_params(params), priority, salt)
    raise WireError(f"a request cannot be read: {values!r:.200}")


@functools.cache
def _default_params() -> dict[str, Any]:
    return _fields(SamplingParams())


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _encode_params(params: SamplingParams) -> dict[str, Any]:
    """Write the parameters that differ from the defaults."""
    defaults = _default_params()
    values = {
        name: value
        for name, value in _fields(params).items()
        if value != defaults[name] and name not in _TEXT_FIELDS
    }
    if (structured := values.get("structured_outputs")) is not None:
        given = {k: v for k, v in _fields(structured).items() if v}
        values["structured_outputs"] = {
            k: v for k, v in given.items() if k not in ("backend", "backend_was_auto")
        }
    return values


def _decode_params(values: dict[str, Any]) -> SamplingParams:
    unknown = values.keys() - _default_params().keys()
    if unknown:
        raise WireError(f"sampling parameters have no {sorted(map(str, unknown))[0]!r}")
    if isinstance(given := values.get("structured_outputs"), Mapping):
        values["structured_outputs"] = StructuredOutputsParams(**given)
    return SamplingParams(**values)


# News, from the engine to a front end.


def encode_news(news: EngineNews) -> Message:
    """Write news; all requests in one message.

    Args:
        news: Of one front end; the requests' ids are its numbers.
    """
    step = news.step
    outputs = step.outputs
    ids = [int(output.request_id) for output in outputs]
    tokens = [output.new_token_ids for output in outputs]
    rest: dict[str, Any] = {}
    if ended := [
        [index, FINISH_REASONS.index(output.finish_reason), output.stop_reason]
        for index, output in enumerate(outputs)
        if output.finish_reason is not None
    ]:
        rest["ended"] = ended
    if first := [
        [index, output.num_cached_tokens, output.first_scheduled_time]
        for index, output in enumerate(outputs)
        if output.first_scheduled_time is not None
    ]:
        rest["first"] = first
    if scored := [
        [index, _encode_rows(output.logprobs)]
        for index, output in enumerate(outputs)
        if output.logprobs is not None
    ]:
        rest["logprobs"] = scored
    if step.prompt_logprobs:
        rest["prompts"] = [
            [int(chunk.request_id), chunk.start, _encode_rows(chunk.rows)]
            for chunk in step.prompt_logprobs
        ]
    if news.refused:
        rest["refused"] = [[int(name), reason] for name, reason in news.refused.items()]
    for name in ("failed", "dead"):
        if getattr(news, name) is not None:
            rest[name] = getattr(news, name)
    if news.stats is not None:
        rest["stats"] = _encode_stats(news.stats)
    if all(len(each) == 1 for each in tokens):
        return ["news", ids, [each[0] for each in tokens], rest]
    return ["news", ids, tokens, rest]


def decode_news(message: Message, names: Mapping[int, str]) -> EngineNews:
    """Read what ``encode_news`` has written.

    Args:
        message: From the engine.
        names: The front end's numbers -> its request ids; those that it has aborted are gone.

    Raises:
        WireError: If it is something else.
    """
    match message:
        case ["news", list(ids), list(tokens), dict(rest)] if len(ids) == len(tokens):
            pass
        case _:
            raise WireError(f"news cannot be read: {message!r:.200}")
    outputs = [
        EngineCoreOutput(
            names.get(number, ""),
            new if isinstance(new, list) else [new],
            None,
            None,
            0,
            index,
        )
        for index, (number, new) in enumerate(zip(ids, tokens, strict=True))
    ]
    for index, reason, stop_reason in rest.get("ended", ()):
        outputs[index].finish_reason = FINISH_REASONS[reason]
        outputs[index].stop_reason = stop_reason
    for index, num_cached_tokens, scheduled in rest.get("first", ()):
        outputs[index].num_cached_tokens = num_cached_tokens
        outputs[index].first_scheduled_time = scheduled
    for index, rows in rest.get("logprobs", ()):
        outputs[index].logprobs = _decode_rows(rows)
    prompts = [
        PromptLogprobs(names.get(number, ""), start, _decode_rows(rows))
        for number, start, rows in rest.get("prompts", ())
    ]
    refused = {names.get(number, ""): str(reason) for number, reason in rest.get("refused", ())}
    stats = rest.get("stats")
    return EngineNews(
        StepNews([output for output in outputs if output.request_id], prompts),
        refused,
        rest.get("failed"),
        rest.get("dead"),
        None if stats is None else _decode_stats(stats),
    )


def _encode_rows(rows: LogprobRows) -> list[Any]:
    return [None if each is None else _encode_array(each) for each in rows]


def _decode_rows(values: Any) -> LogprobRows:
    if not isinstance(values, list) or len(values) != len(LogprobRows._fields):
        raise WireError(f"logprobs cannot be read: {values!r:.200}")
    return LogprobRows(*(None if each is None else _decode_array(each) for each in values))  # type: ignore[arg-type]


def _encode_array(values: np.ndarray) -> list[Any]:
    kind = "int32" if values.dtype.kind in "iu" else "float32"
    return [kind, list(values.shape), np.ascontiguousarray(values, kind).tobytes()]


def _decode_array(value: Any) -> np.ndarray:
    match value:
        case [str(kind), list(shape), bytes(data)] if kind in DTYPES:
            return np.frombuffer(data, kind).reshape(shape)
    raise WireError(f"an array cannot be read: {value!r:.200}")


STATS_FIELDS = tuple(field.name for field in dataclasses.fields(SchedulerStats))


def _encode_stats(stats: SchedulerStats) -> list[float]:
    return [getattr(stats, name) for name in STATS_FIELDS]


def _decode_stats(values: Sequence[Any]) -> SchedulerStats:
    return SchedulerStats(**dict(zip(STATS_FIELDS, values, strict=True)))


def encode_info(info: EngineInfo) -> dict[str, Any]:
    """Write what an engine is."""
    values = _fields(info)
    return {
        **values,
        "eos_token_ids": sorted(info.eos_token_ids),
        "compile_seconds": list(info.compile_seconds),
    }


def decode_info(values: Mapping[str, Any]) -> EngineInfo:
    """Read what ``encode_info`` has written."""
    return EngineInfo(**{**values, "eos_token_ids": frozenset(values["eos_token_ids"])})


def encode_result(result: Any) -> list[Any]:
    """Write what a called method has returned, or its exception."""
    if isinstance(result, ValueError):
        return ["refused", str(result)]
    if isinstance(result, Exception):
        return ["failed", f"{type(result).__name__}: {result}"]
    if isinstance(result, SchedulerStats):
        return ["stats", _encode_stats(result)]
    return ["value", result]


def decode_result(values: Any) -> Any:
    """Read what ``encode_result`` has written; an exception is returned, not raised."""
    match values:
        case ["refused", str(text)]:
            return ValueError(text)
        case ["failed", str(text)]:
            return RuntimeError(text)
        case ["stats", list(stats)]:
            return _decode_stats(stats)
        case ["value", value]:
            return value
    raise WireError(f"a result cannot be read: {values!r:.200}")
