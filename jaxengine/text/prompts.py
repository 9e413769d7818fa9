"""The forms that a prompt may have, brought into one: text or None, and token ids."""

import contextlib
from array import array
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from jaxengine.engine.scheduling.request import token_id_outside

Prompt = str | Sequence[int] | Mapping[str, Any]
EncodedPrompt = tuple[str | None, "array[int]"]


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


def parse_prompt(prompt: Prompt) -> tuple[str | None, Sequence[int] | None]:
    """Return (text, token ids); one of them may be None."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, _as_token_ids(prompt)
    token_ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
    if not isinstance(text, str) and (text is not None or token_ids is None):
        raise ValueError(
            f"a prompt needs 'prompt' (text) or 'prompt_token_ids', got {dict(prompt)!r:.200}"
        )
    return text, None if token_ids is None else _as_token_ids(token_ids)


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
