"""The pre-tokenisers that GGUF files name, as Hugging Face's tokenizer.json writes them.

A GGUF file only has a name for the way text is cut into words before BPE.
Sources: the tokenizer.json of each model; llama.cpp, src/llama-vocab.cpp, for which names agree.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex: bool) -> Json:
    """The step that writes bytes as letters; with GPT-2's own word regex, or after another."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(regex: str) -> Json:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


GPT2_WORDS = byte_level(use_regex=True)
# Digits first and alone: GPT-2's regex would take a space and a number as one word.
SINGLE_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, GPT2_WORDS)
LLAMA3_WORDS = _sequence(_split(LLAMA3), byte_level(use_regex=False))
QWEN2_WORDS = _sequence(_split(QWEN2), byte_level(use_regex=False))
TEKKEN_WORDS = _sequence(_split(TEKKEN), byte_level(use_regex=False))

PRE_TOKENIZERS: dict[str, Json] = {
    "default": GPT2_WORDS,
    "gpt-2": GPT2_WORDS,
    "olmo": GPT2_WORDS,
    "smollm": SINGLE_DIGITS,
    "starcoder": SINGLE_DIGITS,
    "refact": SINGLE_DIGITS,
    "codeshell": SINGLE_DIGITS,
    "command-r": SINGLE_DIGITS,
    "llama3": LLAMA3_WORDS,
    "llama-v3": LLAMA3_WORDS,
    "llama-bpe": LLAMA3_WORDS,
    "qwen2": QWEN2_WORDS,
    "deepseek-r1-qwen": QWEN2_WORDS,
    "tekken": TEKKEN_WORDS,
}

# Models whose tokenizer.json also normalises to NFC, which llama.cpp leaves out.
NFC_MODELS = ("qwen2", "deepseek-r1-qwen")
