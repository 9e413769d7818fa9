"""Fields of a request -> SamplingParams, and how its prompts are tokenized."""

from typing import Any

from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.server.errors import ApiError
from jaxengine.server.protocol.common import SamplingFields
from jaxengine.server.settings import ServerSettings
from jaxengine.structured.params import structured_outputs_from

# Of the same name in SamplingParams; None takes the model's default.
_WITH_MODEL_DEFAULT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OWN = (
    *("n", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "bad_words"),
    *("prompt_logprobs", "logprob_token_ids", "thinking_token_budget"),
)


def check_limits(body: SamplingFields, settings: ServerSettings) -> None:
    """Hold a request against the server's limits.

    Raises:
        ApiError: Naming the field, the limit and the flag.
    """
    if (body.n or 1) > settings.max_n:
        raise ApiError(f"n is {body.n}, the limit is {settings.max_n} (--max-n)", param="n")
    stops = body.stop if isinstance(body.stop, list) else []
    if len(stops) > settings.max_stop_strings:
        raise ApiError(
            f"stop has {len(stops)} strings, the limit is {settings.max_stop_strings} "
            "(--max-stop-strings)",
            param="stop",
        )
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options need stream to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError("prompt_logprobs are not sent in streams", param="prompt_logprobs")


def sampling_params(
    body: SamplingFields, defaults: dict[str, Any], *, default_max_tokens: int | None, **own: Any
) -> SamplingParams:
    """Return a request's sampling parameters.

    Args:
        body: The request.
        defaults: The model's own.
        default_max_tokens: If neither the request nor the model says.
        own: What the endpoint has under other names.

    Raises:
        ValueError: If they are not possible.
    """
    values: dict[str, Any] = {}
    for name in _WITH_MODEL_DEFAULT:
        given = getattr(body, name)
        if given is not None:
            values[name] = given
        elif name in defaults:
            values[name] = defaults[name]
    for name in _OWN:
        given = getattr(body, name)
        if given is not None:
            values[name] = given
    if (structured := structured_outputs_from(body.model_dump(exclude_none=True))) is not None:
        values["structured_outputs"] = structured
    max_tokens = own.pop("max_tokens", None)
    values["max_tokens"] = max_tokens or defaults.get("max_tokens") or default_max_tokens
    values.update({name: value for name, value in own.items() if value is not None})
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(output_kind=kind, **values)


def tokenization_of(body: SamplingFields, *, add_special_tokens: bool) -> dict[str, Any]:
    """Return the ``tokenization_kwargs`` of a request."""
    return {
        "add_special_tokens": add_special_tokens,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "truncation_side": body.truncation_side,
    }
