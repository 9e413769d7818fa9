"""Text <-> token ids: loads a Hugging Face tokenizer and renders its chat template.

Only fast tokenizers (``tokenizer.json``), without torch and without code from the checkpoint.
"""

import codecs
import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.text.detokenizer import (
    PRIMING_TOKENS,
    REPLACEMENT,
    ByteDetokenizer,
    DecoderKind,
    TokenBytes,
    WindowDetokenizer,
)
from jaxengine.text.messages import Message, normalize_messages
from jaxengine.text.precompiled import check_tokenizer_json, is_panic

__all__ = ["ChatOptions", "IncrementalDetokenizer", "Message", "Tokenizer", "load_tokenizer"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IncrementalDetokenizer = ByteDetokenizer | WindowDetokenizer

# What ``apply_chat_template`` takes besides the template's variables, and has no place in a prompt.
NO_TEMPLATE_VARIABLES = frozenset(
    (
        *("chat_template", "tokenize", "conversation", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a conversation is written.

    Attributes:
        chat_template: Jinja template in place of the tokenizer's.
        add_generation_prompt: End with the start of the assistant's answer.
        continue_final_message: End inside the last message instead, to be continued.
        tools: JSON schemas of functions, for the template.
        documents: Texts for the template.
        content_format: "auto", "string" or "openai": what the template takes as content.
        variables: Further variables of the template.
    """

    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[dict[str, Any]] | None = None
    documents: Sequence[dict[str, Any]] | None = None
    content_format: str = "auto"
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def merged(
        cls, options: Mapping[str, Any], template_kwargs: Mapping[str, Any] | None = None
    ) -> "ChatOptions":
        """Put arguments and ``chat_template_kwargs`` together; the latter win.

        Raises:
            ValueError: If one of these is nothing that a template could see.
        """
        given = dict(template_kwargs or {})
        refused = sorted(given.keys() & NO_TEMPLATE_VARIABLES)
        if refused:
            raise ValueError(
                f"chat_template_kwargs holds {refused[0]!r}, which is no variable of a template: "
                "leave it out, or use the argument of that name"
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"variables"}
        values = {**options, **given}
        variables = {name: value for name, value in values.items() if name not in names}
        return cls(**{k: v for k, v in values.items() if k in names}, variables=variables)


class Tokenizer:
    """A Hugging Face fast tokenizer and what the engine needs around it.

    Args:
        hf_tokenizer: The tokenizer; its ``backend_tokenizer`` does the work.
        generation_config: The model's ``generation_config.json``, for its end tokens.
    """

    def __init__(
        self,
        hf_tokenizer: "PreTrainedTokenizerFast",
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.hf_tokenizer = hf_tokenizer
        self._lock = threading.Lock()
        self._backend = hf_tokenizer.backend_tokenizer
        self.eos_token_ids = _eos_token_ids(hf_tokenizer, generation_config or {})
        self._decoder_kind = DecoderKind(self._backend)
        added = hf_tokenizer.added_tokens_decoder
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return len(self.hf_tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how to write a conversation."""
        return bool(self.hf_tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text; text that spells a special token becomes that token.
            add_special_tokens: Add what the tokenizer puts around a text, such as a
                beginning-of-sequence token.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the token ids of several texts, on all cores; from any thread."""
        if not texts:
            return []
        try:
            with self._lock:  # each call sets the truncation of the one tokenizer that all share
                return self._encode_batch(texts, add_special_tokens)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ValueError(
                f"the tokenizer {self.hf_tokenizer.name_or_path!r} is damaged, it failed on a text "
                f"({str(error)[:200]}): fetch it again"
            ) from None

    def encode_typed(
        self,
        texts: Sequence[str],
        seconds: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        adds_special: bool = True,
    ) -> list[tuple[list[int], list[int]]]:
        """Return the token ids and the token types of texts, or of pairs of them.

        Args:
            texts: Each alone, or the first of each pair.
            seconds: The second of each pair.
            max_length: Most tokens, special ones included; the longer text of a pair is cut first.
            adds_special: Add what the tokenizer puts around a text or a pair.
        """
        with self._lock:
            encoded = self.hf_tokenizer(
                list(texts),
                None if seconds is None else list(seconds),
                add_special_tokens=adds_special,
                return_attention_mask=False,
                return_token_type_ids=True,
                truncation=max_length is not None,
                max_length=max_length,
                verbose=False,
            )
        return list(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True))

    def _encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encoded = self.hf_tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, exactly as their bytes say."""
        return str(
            self.hf_tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def token_text(self, token_id: int, context: Sequence[int] = ()) -> str:
        """Return the text that one token adds, special tokens included.

        Args:
            token_id: The token.
            context: What stands before it. A character that is split over tokens belongs to the
                one that completes it; those before it have no text.
        """
        if self._decoder_kind.token_to_bytes is None:
            text = self.decode([token_id], skip_special_tokens=False)
            return text.rstrip(REPLACEMENT)
        content = self._all_bytes[token_id]
        text = content.decode(errors="replace")
        if REPLACEMENT not in text:
            return text
        before = b"".join(map(self._all_bytes.__getitem__, context[-PRIMING_TOKENS:]))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(before)
        return decoder.decode(content)

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> IncrementalDetokenizer:
        """Start the text of an output.

        Args:
            prompt_token_ids: The prompt that it continues.
            skip_special_tokens: Leave special tokens out.
            spaces_between_special_tokens: Accepted for vLLM's sake; fast tokenizers put
                no spaces there.
        """
        del spaces_between_special_tokens
        if self._decoder_kind.token_to_bytes is None:
            return WindowDetokenizer(
                lambda token_ids: self.decode(token_ids, skip_special_tokens), prompt_token_ids
            )
        table = self._text_bytes if skip_special_tokens else self._all_bytes
        return ByteDetokenizer(table, prompt_token_ids, self._decoder_kind.strips_first_space)

    def chat_template_source(
        self, chat_template: str | None = None, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """Return the template that a conversation is written with.

        Raises:
            ValueError: If there is none.
        """
        if not chat_template and not self.has_chat_template:
            raise ValueError(
                f"the tokenizer {self.hf_tokenizer.name_or_path!r} has no chat template; pass "
                "chat_template=, or use generate() with a prompt in the model's own format"
            )
        try:
            return str(
                self.hf_tokenizer.get_chat_template(chat_template, list(tools or ()) or None)
            )
        except ValueError as error:
            raise ValueError(f"chat_template {chat_template!r:.200}: {error}") from error

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """Write a conversation as the model's prompt; ``options`` as in ``ChatOptions``.

        Raises:
            ValueError: If there is no template, or it refuses the messages.
        """
        return self.render(messages, ChatOptions.merged(options))

    def render(self, messages: Sequence[Message], options: "ChatOptions") -> str:
        """Write a conversation as the model's prompt.

        Raises:
            ValueError: As ``render_chat``.
        """
        template = self.chat_template_source(options.chat_template, options.tools)
        if options.add_generation_prompt and options.continue_final_message:
            raise ValueError(
                "add_generation_prompt and continue_final_message exclude each other: "
                "set add_generation_prompt=False to continue the last message"
            )
        normal = normalize_messages(messages, template, options.content_format)
        if not normal:
            raise ValueError("a conversation needs at least one message")
        try:
            text = self.hf_tokenizer.apply_chat_template(
                normal,
                chat_template=template,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tools=list(options.tools) if options.tools else None,
                documents=list(options.documents) if options.documents else None,
                tokenize=False,
                **options.variables,
            )
        except Exception as error:  # a template can fail in every way that Python has
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refused the messages: {reason}") from error
        return str(text)

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Return the token ids of a conversation; ``options`` as in ``render_chat``.

        The template writes the special tokens itself, so none are added.
        """
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def bad_words_token_ids(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Return the token sequences that write these words, as vLLM has them.

        A word is banned as it stands. Behind a space it is banned too if the space is part of its
        first token. Where the space is a token of its own, that token would be the first of every
        word, and where the space cuts the word into other tokens, its last token, the one that is
        masked, would be the end of many words.

        Args:
            bad_words: Texts; spaces before them do not matter.

        Raises:
            ValueError: If a word has no token.
        """
        sequences: list[list[int]] = []
        for word in bad_words:
            token_ids = self.encode(word.lstrip(), add_special_tokens=False)
            if not token_ids:
                raise ValueError(f"bad_words holds {word!r}, which has no token: leave it out")
            behind_space = self.encode(" " + word.lstrip(), add_special_tokens=False)
            sequences.append(token_ids)
            if len(behind_space) == len(token_ids) and behind_space[0] != token_ids[0]:
                sequences.append(behind_space)
        return list(map(list, dict.fromkeys(map(tuple, sequences))))

    @cached_property
    def _all_bytes(self) -> TokenBytes:
        return self._byte_table(frozenset())

    @cached_property
    def _text_bytes(self) -> TokenBytes:
        return self._byte_table(self._special_ids)

    def _byte_table(self, skipped_ids: frozenset[int]) -> TokenBytes:
        assert self._decoder_kind.token_to_bytes is not None
        return TokenBytes(self._backend.id_to_token, self._decoder_kind.token_to_bytes, skipped_ids)


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return a model's tokenizer.

    Raises:
        ValueError: If there is none.
    """
    if tokenizer is None:
        raise ValueError(
            "this model was loaded with skip_tokenizer_init=True: give token ids, or load it "
            "without that flag"
        )
    return tokenizer


def load_tokenizer(
    source: str | Path,
    *,
    generation_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Load the tokenizer of a model directory or a hub name.

    Args:
        source: Directory with ``tokenizer.json``, or a hub name.
        generation_config: The model's ``generation_config.json``, for its end tokens.
        revision: Branch, tag or commit at the hub.
        trust_remote_code: Must be False.

    Raises:
        ValueError: If the tokenizer cannot be loaded, or only by running its own code.
    """
    if trust_remote_code:
        raise ValueError(
            "trust_remote_code is refused: it would run Python code from the checkpoint with "
            "your rights. Pass tokenizer= a directory with a tokenizer.json instead"
        )
    if str(source)[:1] in ("/", ".", "~") and not Path(source).exists():
        raise ValueError(
            f"the tokenizer {str(source)!r} is missing: give a directory with a tokenizer.json, or "
            "a hub name"
        )
    # Imported here because it takes seconds (with torch installed, which it then loads, several),
    # and because it advises at import to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        check_tokenizer_json(Path(source) / "tokenizer.json")
        hf_tokenizer: Any = AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # transformers raises almost any type here
        raise ValueError(_load_failure(source, error)) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(_load_failure(source, error)) from None
    if getattr(hf_tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"the tokenizer in {str(source)!r} has no fast version; pass tokenizer= a directory "
            "with a tokenizer.json"
        )
    return Tokenizer(hf_tokenizer, generation_config)


def _load_failure(source: str | Path, error: BaseException) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        reason = "it needs Python code from the checkpoint, which is never run"
    return (
        f"no tokenizer could be loaded from {str(source)!r}: {reason[:300]}. "
        "Pass tokenizer= a directory with a tokenizer.json, or a hub name that can be reached"
    )


def _eos_token_ids(
    hf_tokenizer: "PreTrainedTokenizerFast", generation_config: Mapping[str, Any]
) -> frozenset[int]:
    """End tokens of the generation config (one or several) and of the tokenizer."""
    configured = generation_config.get("eos_token_id")
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(i for i in (*ids, hf_tokenizer.eos_token_id) if i is not None)
