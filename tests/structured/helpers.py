"""A tiny vocabulary, and random walks through grammars that need no model."""

import functools
import random
from typing import Any

import numpy as np
import transformers

from jaxengine.structured.compiler import GrammarCompiler
from jaxengine.structured.constraint import TokenConstraint, num_mask_words
from jaxengine.structured.params import StructuredOutputsParams
from jaxengine.structured.token_vocabulary import build_token_vocabulary

EOS = 1
VOCAB_SIZE = 150  # more than the tokenizer has: the model's is padded
# Whole words beside single characters, so that a token may cross a grammar's parts.
WORDS = [
    "true",
    "null",
    '":',
    '{"',
    '"}',
    "},",
    ", ",
    "name",
    "12",
    "</",
    "<tool",
    "call",
    "_call>",
]


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Printable ASCII, line end, some longer tokens, and two special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted([chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ", "č"])
    names = ["<pad>", "</s>", *alphabet]
    vocab = {name: number for number, name in enumerate(names)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        text = word.replace(" ", "Ġ")
        for end in range(2, len(text) + 1):
            if text[:end] not in vocab:
                vocab[text[:end]] = len(vocab)
                merges.append((text[: end - 1], text[end - 1]))
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<pad>", "</s>", "<|tool|>", "<|end|>")]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>"
    )
    assert len(fast) <= VOCAB_SIZE
    return fast


@functools.cache
def compiler() -> GrammarCompiler:
    """A compiler for the tiny vocabulary, shared."""
    return GrammarCompiler(lambda: build_token_vocabulary(tokenizer(), VOCAB_SIZE, [EOS]))


def new_state(**fields: Any) -> Any:
    """The beginning of an output that obeys ``StructuredOutputsParams(**fields)``."""
    return compiler().compile(StructuredOutputsParams(**fields)).new_state()


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return list(tokenizer().encode(text, add_special_tokens=False))


def decode(token_ids: list[int]) -> str:
    """The text of an output, without its end token."""
    return str(tokenizer().decode([t for t in token_ids if t != EOS], skip_special_tokens=False))


def allowed_ids(constraint: TokenConstraint) -> list[int]:
    """The tokens that may follow, from the mask."""
    row = np.zeros(num_mask_words(VOCAB_SIZE), np.int32)
    constraint.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def random_output(constraint: TokenConstraint, seed: int, max_tokens: int = 400) -> list[int]:
    """Follow random allowed tokens; ends early where it can once it is long."""
    rng = random.Random(seed)
    tokens: list[int] = []
    while not tokens or tokens[-1] != EOS:
        assert len(tokens) < max_tokens, f"no end in sight: {decode(tokens)!r}"
        allowed = allowed_ids(constraint)
        assert allowed, "nothing may follow"
        is_long = len(tokens) > 20
        closing = [t for t in allowed if t == EOS or decode([t]) in CLOSING] if is_long else []
        tokens.append(rng.choice(closing or allowed))
        constraint.accept(tokens[-1])
        assert constraint.error is None
    return tokens


CLOSING = {'"', "}", "]", '"}', "l", "e", "0"}
