"""A RequestOutput as JSON has it, and the sampling parameters that fit to it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams

# Set by ours, or of no effect on the JSON: nobody may ask for them.
_NOT_OFFERED = (
    *("output_kind", "detokenize", "structured_outputs", "extra_args", "bad_words_token_ids"),
    *("logprobs", "prompt_logprobs", "logprob_token_ids"),
)
SAMPLING_FIELDS = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.name not in _NOT_OFFERED
)


def with_fields(defaults: SamplingParams, fields: Mapping[str, Any]) -> SamplingParams:
    """Return sampling parameters with some fields replaced by those of a JSON object.

    Raises:
        ValueError: If a field is not offered, or its value is not possible.
    """
    if unknown := sorted(set(fields) - set(SAMPLING_FIELDS)):
        raise ValueError(
            f"{', '.join(unknown)}: no such field; sampling parameters are "
            f"{', '.join(SAMPLING_FIELDS)}"
        )
    try:
        return defaults.clone(**fields)
    except TypeError as error:
        raise ValueError(f"a sampling parameter has the wrong type: {error}") from error


def check_offered(params: SamplingParams) -> None:
    """Refuse logprobs, which the JSON does not show.

    Raises:
        ValueError: If any are asked for.
    """
    for name in ("logprobs", "prompt_logprobs", "logprob_token_ids"):
        if getattr(params, name) is not None:
            raise ValueError(f"{name} are not written to JSON: leave it out, or use LLM.generate")


def as_json(output: RequestOutput) -> dict[str, Any]:
    """Return the fields that a reply or a row of results shows."""
    outputs = [
        {
            "index": each.index,
            "text": each.text,
            "token_ids": list(each.token_ids),
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
        }
        for each in output.outputs
    ]
    return {"num_prompt_tokens": len(output.prompt_token_ids), "outputs": outputs}


def message_of(error: Exception) -> str:
    """Return what a user reads of an error, without the number that the LLM gave the request."""
    return re.sub(r"^request '\w+': ", "", str(error)) or type(error).__name__
