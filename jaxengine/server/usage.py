"""Usage: how many tokens a request has cost."""

from collections.abc import Iterable
from typing import Any

from jaxengine.outputs import RequestOutput


class UsageCounter:
    """Counts the tokens of the outputs of one request, streamed or whole."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}  # tokens, and those of them cached
        self._num_generated = 0

    def add(self, index: int, output: RequestOutput) -> None:
        """Take in an output of a prompt (only what is new in it, or all of it)."""
        if index not in self._prompts:
            cached = output.num_cached_tokens or 0
            self._prompts[index] = (len(output.prompt_token_ids), cached)
        self._num_generated += sum(len(each.token_ids) for each in output.outputs)

    def values(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        num_prompt = sum(tokens for tokens, _ in self._prompts.values())
        cached = sum(cached for _, cached in self._prompts.values())
        return {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt + self._num_generated,
            "completion_tokens": self._num_generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """Return the usage of whole outputs."""
    counter = UsageCounter()
    for index, output in enumerate(outputs):
        counter.add(index, output)
    return counter.values()
