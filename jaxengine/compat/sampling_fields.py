"""Sampling parameters that vLLM has or had and ``SamplingParams`` has not.

Standard library only.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxengine.compat.similar_names import did_you_mean


@dataclasses.dataclass(frozen=True)
class FormerField:
    """A field that is taken if it asks for nothing, and refused by name else.

    Attributes:
        name: As vLLM spells it.
        neutral: Values that ask for nothing, beside None and what is empty.
        remedy: What to do instead.
    """

    name: str
    neutral: tuple[Any, ...]
    remedy: str


FORMER_FIELDS = (
    FormerField("best_of", (), "ask for n outputs and take the one with the best logprobs"),
    FormerField("use_beam_search", (False,), "call LLM.beam_search with BeamSearchParams"),
    FormerField("length_penalty", (1, 1.0), "it belongs to BeamSearchParams"),
    FormerField("early_stopping", (False,), "call LLM.beam_search"),
    FormerField(
        "logits_processors",
        (),
        "edit logits with logit_bias, allowed_token_ids, bad_words or structured_outputs",
    ),
    FormerField("truncate_prompt_tokens", (), "give it in tokenization_kwargs of LLM.generate"),
    FormerField("stream_interval", (1,), "every new token is given out"),
    FormerField("skip_clone", (False, True), ""),
    FormerField("watermarking", (False,), "outputs are not marked"),
    FormerField("repetition_detection", (), "use repetition_penalty or frequency_penalty"),
    FormerField("routed_experts_prompt_start", (0,), "experts are not returned"),
    FormerField("trace_decode_token_ids", (), "score given tokens with prompt_logprobs"),
    FormerField("prompt_logprob_start", (), "give prompt_logprobs and read the rows from there on"),
    FormerField("prompt_logprob_token_ids", (), "give prompt_logprobs=-1 and read these tokens"),
    *(
        FormerField(f"guided_{kind}", (), f"use structured_outputs={{'{kind}': ...}}")
        for kind in ("json", "regex", "choice", "grammar", "json_object")
    ),
)
_FIELD_OF = {each.name: each for each in FORMER_FIELDS}

_Class = TypeVar("_Class", bound=type)


def takes_former_fields(cls: _Class) -> _Class:
    """Let a dataclass's constructor take the former fields, too."""
    generated: Callable[..., None] = cls.__init__  # type: ignore[misc]
    known = tuple(field.name for field in dataclasses.fields(cls))

    @functools.wraps(generated)
    def initialize(self: Any, *positional: Any, **fields: Any) -> None:
        generated(self, *positional, **_without_former_fields(fields, known))

    cls.__init__ = initialize  # type: ignore[misc]
    return cls


def _without_former_fields(fields: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        elif name not in _FIELD_OF:
            names = (*known, *_FIELD_OF)
            raise TypeError(f"there is no sampling parameter {name!r}{did_you_mean(name, names)}")
        elif not _is_neutral(_FIELD_OF[name], value, fields):
            raise ValueError(f"{name}={value!r:.200} is not supported: {_FIELD_OF[name].remedy}")
    return kept


def _is_neutral(field: FormerField, value: Any, fields: Mapping[str, Any]) -> bool:
    if field.name == "best_of" and value in (1, fields.get("n", 1)):
        return True
    is_empty = value is None or (isinstance(value, list | tuple | dict | str) and not value)
    return is_empty or any(type(value) is type(each) and value == each for each in field.neutral)
