"""Logprobs in the forms of OpenAI's answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.outputs import Logprob

LOWEST = -9999.0  # JSON has no infinity


def token_text(token_id: int, logprob: Logprob, as_id: bool) -> str:
    """Write a token: its text, or "token_id:7"."""
    return f"token_id:{token_id}" if as_id else logprob.decoded_token or ""


def finite(value: float) -> float:
    """Return a logprob that JSON can hold."""
    return value if math.isfinite(value) else LOWEST


def chat_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Mapping[int, Logprob]],
    num_top: int | None,
    as_id: bool,
) -> dict[str, Any]:
    """Write the logprobs of a chat's tokens.

    Args:
        token_ids: Of the output, or of its newest part.
        entries: One a token.
        num_top: How many of the most likely tokens; None for all there are.
        as_id: Write tokens as "token_id:7".
    """
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        ranked = [i for i in entry if entry[i].rank is not None or i != token_id]
        ranked.sort(key=lambda i: -entry[i].logprob)
        top = ranked if num_top is None else ranked[:num_top]
        content.append(
            {
                **_chat_token(token_id, entry[token_id], as_id),
                "top_logprobs": [_chat_token(i, entry[i], as_id) for i in top],
            }
        )
    return {"content": content}


def _chat_token(token_id: int, logprob: Logprob, as_id: bool) -> dict[str, Any]:
    text = token_text(token_id, logprob, as_id)
    return {
        "token": text,
        "logprob": finite(logprob.logprob),
        "bytes": list(text.encode("utf-8", "replace")),
    }


class CompletionLogprobsWriter:
    """Writes the logprobs of one output in the older form, with offsets that go on.

    Args:
        num_top: How many of the most likely tokens.
        as_id: Write tokens as "token_id:7".
    """

    def __init__(self, num_top: int, as_id: bool) -> None:
        self._num_top = num_top
        self._as_id = as_id
        self._offset = 0

    def write(
        self, token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None]
    ) -> dict[str, Any]:
        """Write the next tokens; those of a prompt come first, the very first without logprob."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            logprob = Logprob(0.0, decoded_token="") if entry is None else entry[token_id]
            text = token_text(token_id, logprob, self._as_id)
            tokens.append(text)
            values.append(None if entry is None else finite(logprob.logprob))
            tops.append(None if entry is None else self._top(entry))
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self._num_top else None,
            "text_offset": offsets,
        }

    def _top(self, entry: Mapping[int, Logprob]) -> dict[str, float]:
        """The most likely tokens; the sampled one besides, where it is not among them."""
        return {
            token_text(token_id, logprob, self._as_id): finite(logprob.logprob)
            for token_id, logprob in entry.items()
        }


def prompt_logprobs(
    entries: Sequence[Mapping[int, Logprob] | None] | None,
) -> list[dict[str, Any] | None] | None:
    """Write the logprobs of a prompt, as vLLM does."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in entry.items()
        }
        for entry in entries
    ]
