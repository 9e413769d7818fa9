"""The text of one output as it grows: detokenized, searched for stop strings, handed out."""

from jaxengine.engine.scheduling.request import FinishReason
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.text.stop_strings import StopStrings
from jaxengine.text.tokenizer import IncrementalDetokenizer


class OutputText:
    """Text of an output. Ends in front of a stop string, or behind it if that is included.

    Args:
        detokenizer: Fresh, primed with the prompt.
        params: The request's sampling parameters.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(params.stop_strings)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self._waits_for_end = is_final_only and not self._stops
        self._waiting: list[int] = []
        self._text = ""
        self._num_taken = 0  # characters handed out

    def add(
        self, token_ids: list[int], num_tokens: int, finish_reason: FinishReason | None
    ) -> str | None:
        """Add tokens.

        Args:
            token_ids: The new ones.
            num_tokens: Length of the output with them.
            finish_reason: Why the output ends with them; STOP means that the last one is a
                stop token, whose text is left out unless stop strings are included.

        Returns:
            The stop string that ends the output here.
        """
        if self._waits_for_end and finish_reason is None:
            self._waiting += token_ids
            return None
        if self._waiting:
            token_ids = self._waiting + token_ids
        if finish_reason is FinishReason.STOP and not self._includes_stop:
            token_ids = token_ids[:-1]
        num_old = len(self._text)
        self._text += self._detokenizer.append(token_ids)
        if finish_reason is not None:
            self._text += self._detokenizer.flush()
        if self._stops and num_tokens > self._min_tokens:
            return self._cut(num_old)
        return None

    def take(self, *, is_delta: bool, is_final: bool) -> str:
        """Return the text so far, or what was not handed out before.

        Unless it is final, text that could become a stop string is held back.
        """
        end = len(self._text)
        if self._stops and not is_final and not self._includes_stop:
            end -= self._stops.num_held_characters(self._text)
        start = self._num_taken if is_delta else 0
        self._num_taken = end
        return self._text[start:end]

    def _cut(self, num_old_characters: int) -> str | None:
        match = self._stops.find(self._text, num_old_characters)
        if match is None:
            return None
        end = match.start + len(match.stop) if self._includes_stop else match.start
        self._text = self._text[:end]
        return match.stop
