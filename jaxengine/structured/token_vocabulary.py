"""The model's tokens as the grammar compiler needs them: the bytes that each token stands for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llguidance

from jaxengine.structured.constraint import num_mask_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenVocabulary:
    """The tokens of a model.

    Attributes:
        ll_tokenizer: Their bytes, indexed for masks.
        special_ids: Text of a special token -> its id. Their texts never match a grammar's
            strings: a grammar names them by their ids.
        num_words: Length of a mask of all tokens that the tokenizer or the model has.
    """

    ll_tokenizer: llguidance.LLTokenizer
    special_ids: dict[str, int]
    num_words: int


def build_token_vocabulary(
    hf_tokenizer: "PreTrainedTokenizerFast", vocab_size: int, eos_token_ids: Iterable[int]
) -> TokenVocabulary:
    """Index a tokenizer's vocabulary: about a second for 128,000 tokens.

    Args:
        hf_tokenizer: A fast tokenizer, from ``tokenizer.json`` or made from a GGUF file.
        vocab_size: Of the model. It may have more tokens than the tokenizer, which are never
            allowed then.
        eos_token_ids: Tokens that end an output, and so a grammar.

    Raises:
        ValueError: If there is no end token, or the tokenizer's tokens do not stand for bytes.
    """
    # Imported here because it imports transformers, which takes seconds.
    from llguidance.hf import from_tokenizer

    end_ids = sorted(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
    if not end_ids:
        raise ValueError(
            "structured outputs end with the model's end-of-sequence token, and this model names "
            "none: set eos_token_id in its generation_config.json"
        )
    size = max(vocab_size, len(hf_tokenizer))
    try:
        ll_tokenizer = from_tokenizer(hf_tokenizer, n_vocab=size, eos_token=end_ids)
    except Exception as error:  # the library raises almost any type here
        raise ValueError(
            f"structured outputs cannot be served with this tokenizer: {error}"
        ) from error
    added = hf_tokenizer.added_tokens_decoder
    special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
    return TokenVocabulary(ll_tokenizer, special_ids, num_mask_words(size))
