"""The forms that a prompt may have, brought into one: text or None, and token ids."""

import contextlib
import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Required, TypedDict

import numpy as np

from jaxengine.engine.scheduling.request import token_id_outside

Prompt = str | Sequence[int] | Mapping[str, Any]

# What the other inputs of a multi-modal or encoder-decoder model are called: None means none.
_FOREIGN_KEYS = frozenset(
    (
        *("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "media_io_kwargs"),
        *("prompt_embeds", "token_type_ids", "prompt_token_offsets", "negative_prompt"),
        *("encoder_prompt", "decoder_prompt"),
    )
)
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class TextPrompt(TypedDict, total=False):
    """A prompt as text."""

    prompt: Required[str]
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids, with the text that they stand for if it is known."""

    prompt_token_ids: Required[Sequence[int]]
    prompt: str
    cache_salt: str


class ParsedPrompt(NamedTuple):
    """A prompt in one form.

    Attributes:
        text: None if it was given as token ids only.
        token_ids: None if they are still to be made from the text.
        cache_salt: Requests share cached blocks only with those of the same salt.
    """

    text: str | None
    token_ids: Sequence[int] | None
    cache_salt: str | None = None


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it; the fields are those of ``ParsedPrompt``."""

    text: str | None
    token_ids: "array[int]"
    cache_salt: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenizationOptions:
    """How text becomes tokens, as ``tokenization_kwargs`` of vLLM.

    Attributes:
        add_special_tokens: Add what the tokenizer puts around a text.
        truncate_prompt_tokens: Most tokens of a prompt; -1 is what the model can read.
        truncation_side: Where tokens are dropped.
    """

    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "TokenizationOptions":
        """Read ``tokenization_kwargs``.

        Raises:
            ValueError: If one of them is not known or not possible.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in (options or {}).items() if value is not None}
        for name in given.keys() - known:
            raise ValueError(f"tokenization_kwargs has no {name!r}: use {', '.join(sorted(known))}")
        result = cls(**given)
        limit = result.truncate_prompt_tokens
        if limit is not None and (not isinstance(limit, int) or limit < -1 or limit == 0):
            raise ValueError(f"truncate_prompt_tokens must be -1 or at least 1, got {limit!r}")
        if result.truncation_side not in ("left", "right"):
            raise ValueError(f"truncation_side is {result.truncation_side!r}: use left or right")
        return result

    def truncated(self, token_ids: Sequence[int], max_model_len: int) -> Sequence[int]:
        """Return the tokens that stay; one of the model's length is left for the output."""
        limit = self.truncate_prompt_tokens
        if limit is None:
            return token_ids
        limit = max_model_len - 1 if limit == -1 else limit
        return token_ids[-limit:] if self.truncation_side == "left" else token_ids[:limit]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Make one prompt a list of one.

    Raises:
        ValueError: If it is neither a prompt nor a list.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(
            f"prompts must be text, token ids, a dict or a list of them, got {type(prompts)}"
        )
    is_one = len(prompts) > 0 and isinstance(prompts[0], Integral)
    return [prompts] if is_one else list(prompts)


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Bring a prompt into one form.

    Raises:
        ValueError: If it is no prompt, or has keys that mean nothing here.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if not isinstance(prompt, Mapping):
        return ParsedPrompt(None, _as_token_ids(prompt))
    _check_keys(prompt)
    token_ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
    if not isinstance(text, str) and (text is not None or token_ids is None):
        raise ValueError(
            f"a prompt needs 'prompt' (text) or 'prompt_token_ids', got {dict(prompt)!r:.200}"
        )
    salt = prompt.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt must be a text that is not empty, got {salt!r:.200}")
    return ParsedPrompt(text, None if token_ids is None else _as_token_ids(token_ids), salt)


def _check_keys(prompt: Mapping[str, Any]) -> None:
    given = [key for key in prompt if key not in _KEYS]
    unknown = [key for key in given if key not in _FOREIGN_KEYS]
    if unknown:
        raise ValueError(
            f"a prompt has no key {', '.join(map(repr, unknown))}: use {', '.join(_KEYS)}"
        )
    for key in given:
        if prompt[key] is not None and prompt[key] != {}:
            raise ValueError(
                f"a prompt with {key!r} is not supported: models here read text only; leave it out"
            )


def _as_token_ids(values: Any) -> Sequence[int]:
    """Bring token ids, numpy's too, into an array, or a list where one of them has no 32 bits.

    An array is made in one go. Asking each number what it is costs more than all the rest of a long
    prompt, so that is left to what an array does not take.
    """
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        values = values.tolist()
    is_sequence = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
    if is_sequence and not isinstance(values, bytes | bytearray):  # these it would copy as they lie
        with contextlib.suppress(TypeError, OverflowError):
            return array("i", values)
    if not is_sequence or not all(isinstance(token_id, Integral) for token_id in values):
        raise ValueError(
            f"a prompt must be text, token ids (integers) or a dict of them, got {values!r:.200}"
        )
    return [int(token_id) for token_id in values]


def checked(number: int, token_ids: Sequence[int], vocab_size: int) -> "array[int]":
    """Check here, before anything else looks at them: the tokenizer cannot take just any number."""
    bad = token_id_outside(token_ids, vocab_size)
    if bad is not None:
        raise ValueError(
            f"prompt {number}: token id {bad} is not in the vocabulary of {vocab_size}; "
            "tokenize with this model's tokenizer"
        )
    return token_ids if isinstance(token_ids, array) else array("i", token_ids)
