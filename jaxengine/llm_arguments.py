"""Checks of what is given to a method of LLM, and its forms brought into one."""

from collections.abc import Sequence
from typing import Any

from jaxengine.beam_search import BeamSearchParams
from jaxengine.sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None


def either(prompts: Any, prompt_token_ids: Any) -> Any:
    """Return the prompts, under whichever of their two names they were given."""
    if (prompts is None) == (prompt_token_ids is None):
        raise ValueError("generate needs prompts, as text or as token ids, and nothing besides")
    return prompts if prompt_token_ids is None else prompt_token_ids


def refuse_foreign(**arguments: Any) -> None:
    """Refuse what models here have no use for, unless it is None."""
    for name, value in arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        if any(each is not None and each != {} for each in values):
            remedy = "merge the adapter into the checkpoint" if "lora" in name else "leave it out"
            raise ValueError(f"{name} is not supported: {remedy}")


def as_priorities(priority: int | Sequence[int] | None, count: int) -> list[int]:
    """Return one priority a prompt.

    Raises:
        ValueError: If there are not as many as prompts, or one is no integer of 64 bits.
    """
    given = priority if isinstance(priority, Sequence) else [priority or 0] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} priorities were given for {count} prompts")
    for each in given:
        if not isinstance(each, int) or not -(2**63) <= each < 2**63:
            raise ValueError(f"priority must be an integer of 64 bits, got {each!r:.200}")
    return list(given)


def as_params(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[Any]:
    """Return one set of parameters a prompt.

    Raises:
        ValueError: If there are not as many as prompts, or one is something else.
    """
    given = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(given) != count:
        raise ValueError(
            f"{len(given)} sampling_params were given for {count} prompts: give one for all, or "
            "one for each"
        )
    for each in given:
        if not isinstance(each, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {each!r:.200}")
    return given


def check_logprobs(params: SamplingParams, max_logprobs: int, vocab_size: int) -> None:
    """Hold the numbers of logprobs against the engine's limit.

    Raises:
        ValueError: If one is more.
    """
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        wanted = vocab_size if wanted == -1 else wanted
        if wanted is not None and wanted > max_logprobs and max_logprobs != -1:
            raise ValueError(
                f"{name} {wanted} is more than max_logprobs {max_logprobs}: ask for fewer or raise "
                "--max-logprobs (-1 allows the whole vocabulary)"
            )


def check_token_ids(params: SamplingParams | BeamSearchParams, vocab_size: int) -> None:
    """Hold the token ids among the parameters against the vocabulary.

    Raises:
        ValueError: If one is not in it.
    """
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids", "logprob_token_ids"):
        outside = [i for i in getattr(params, name, None) or () if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(
                f"{name} holds {outside[0]}, which is not in the vocabulary of {vocab_size}: use "
                "ids of this model's tokenizer"
            )
