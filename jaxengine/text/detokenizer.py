"""Token ids -> text, piece by piece, while they are being generated.

In the tokenizers of language models a token stands for a fixed string of bytes: always the
same, whatever surrounds it. ``TokenBytes`` is that table, and text is the UTF-8 decoding of the
tokens' bytes one after the other, which also joins characters that are split over tokens.
Tokenizers with another kind of decoder are decoded in a window of the newest tokens.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any

PRIMING_TOKENS = 6  # of the prompt; a character can be split over four tokens
REPLACEMENT = "\ufffd"
SPACE_MARK = "\u2581"  # SentencePiece's visible space


class TokenBytes(dict[int, bytes]):
    """Bytes of each token, looked up in the vocabulary when first asked for.

    Args:
        id_to_token: The vocabulary; None for an id that has no token.
        token_to_bytes: What a token of the vocabulary stands for.
        skipped_ids: Tokens that stand for nothing, such as special ones.
    """

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        token_to_bytes: Callable[[str], bytes],
        skipped_ids: frozenset[int],
    ) -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._token_to_bytes = token_to_bytes
        self._skipped_ids = skipped_ids

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped_ids else self._id_to_token(token_id)
        self[token_id] = b"" if token is None else self._token_to_bytes(token)
        return self[token_id]


class DecoderKind:
    """What the decoder of a Hugging Face fast tokenizer does to a token.

    Attributes:
        token_to_bytes: Bytes of a token; None if they depend on the tokens around it.
        strips_first_space: Whether a space at the very start of the text is dropped.
    """

    def __init__(self, backend: Any) -> None:
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        self.token_to_bytes: Callable[[str], bytes] | None = None
        self.strips_first_space = False
        if kinds == ["ByteLevel"]:
            self.token_to_bytes = _byte_level_bytes
        elif kinds and all(map(_is_sentencepiece, steps)):
            self.token_to_bytes = _sentencepiece_bytes
            self.strips_first_space = any(
                step["type"] == "Strip"
                or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
                for step in steps
            )


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    decoder = backend.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step for step in steps if step["type"] != "Fuse"]


def _is_sentencepiece(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": SPACE_MARK} and step["content"] == " "
    if step["type"] == "Strip":
        return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == SPACE_MARK)
    return bool(step["type"] == "ByteFallback")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE.

    Source: GPT-2 (Radford et al., 2019): printable Latin-1 stands for itself, the other
    bytes for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE_MARK, " ").encode()


class ByteDetokenizer:
    """Text of a growing output, from the bytes of its tokens. Constant work per token.

    Args:
        token_bytes: The table.
        prompt_token_ids: The prompt: the output may complete a character that it begins.
        strips_first_space: Drop a leading space if the prompt has no text.
    """

    def __init__(
        self, token_bytes: TokenBytes, prompt_token_ids: Sequence[int], strips_first_space: bool
    ) -> None:
        self._bytes_of = token_bytes.__getitem__
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = b"".join(map(self._bytes_of, prompt_token_ids[-PRIMING_TOKENS:]))
        self._strips = strips_first_space and not any(map(self._bytes_of, prompt_token_ids))
        self._decoder.decode(start)

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that has become certain."""
        text = self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """Return what is left at the end: nothing, as a character that was cut off is no text."""
        self._decoder.reset()
        return ""


class WindowDetokenizer:
    """Text of a growing output by decoding a window of tokens twice, without the newest and with.

    For decoders that look at neighbours (WordPiece, ...). The difference of the two is
    the new text, unless it ends in the middle of a character.

    Args:
        decode: Token ids -> text.
        prompt_token_ids: The prompt, for what the first tokens stand behind.
    """

    MAX_HELD = 8  # tokens without certain text, after which the text is taken as it is

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-PRIMING_TOKENS:])
        self._num_read = len(self._window)  # tokens of the window whose text is out

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that has become certain."""
        return "".join(map(self._append_one, token_ids))

    def flush(self) -> str:
        """Return what was held back, without the marks of a character that was cut off."""
        return self._advance(self._new_text()).rstrip(REPLACEMENT)

    def _append_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        is_held = not text or text.endswith(REPLACEMENT)
        if is_held and len(self._window) - self._num_read <= self.MAX_HELD:
            return ""
        return self._advance(text)

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._num_read])
        return self._decode(self._window)[len(before) :]

    def _advance(self, text: str) -> str:
        """Keep the tokens read last as the context of the next ones."""
        self._window = self._window[self._num_read :] or self._window
        self._num_read = len(self._window)
        return text
