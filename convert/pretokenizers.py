"""The pre-tokenisers that GGUF files name, as Hugging Face's tokenizer.json writes them.

A GGUF file only has a name for the way text is cut into words before BPE; the name also says
whether a bos is added and whether words of the vocabulary are taken whole.
Sources: the tokenizer.json of each model; llama.cpp, src/llama-vocab.cpp, for which names agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
)
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTIONS
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
CHINESE_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


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


def _splits(*regexes: str) -> Json:
    """Cut by each regex in turn, then write bytes as letters."""
    return _sequence(*(_split(regex) for regex in regexes), byte_level(use_regex=False))


GPT2_WORDS = byte_level(use_regex=True)
# Digits first and alone: GPT-2's regex would take a space and a number as one word.
SINGLE_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, GPT2_WORDS)
# What llama.cpp does where a file names none: punctuation, GPT-2's words, numbers by threes.
DEFAULT_WORDS = _splits(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
FALCON_WORDS = _splits(r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """What follows from a name.

    Attributes:
        steps: The pre_tokenizer of tokenizer.json.
        ignores_merges: Whether a word of the vocabulary is taken whole, also where no merges
            lead to it.
        adds_bos: Whether a bos is added where the file does not say.
        normalizer: The normaliser of tokenizer.json. llama.cpp leaves out NFC, the models do not.
    """

    steps: Json
    ignores_merges: bool = False
    adds_bos: bool = False
    normalizer: Json | None = None


_NFC = {"type": "NFC"}
_GPT2 = PreTokenizer(GPT2_WORDS)
_DIGITS = PreTokenizer(SINGLE_DIGITS)
_LLAMA3 = PreTokenizer(_splits(LLAMA3), ignores_merges=True, adds_bos=True)
_LLAMA3_WORDS = PreTokenizer(_splits(LLAMA3))
_QWEN2 = PreTokenizer(_splits(QWEN2), normalizer=_NFC)
_QWEN2_WORDS = PreTokenizer(_splits(QWEN2))
_GPT4O = PreTokenizer(_splits(GPT4O))
_DEEPSEEK3 = PreTokenizer(_splits(r"\p{N}{1,3}", CHINESE_AND_KANA, DEEPSEEK3_WORDS))

DEFAULT = "default"
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    DEFAULT: PreTokenizer(DEFAULT_WORDS),
    **dict.fromkeys(
        (
            *("gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion", "granite-docling", "exaone4"),
            *("gigachat", "a.x-4.0", "mellum"),
        ),
        _GPT2,
    ),
    **dict.fromkeys(
        (
            *("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"),
            "mellum2",
        ),
        _DIGITS,
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3_WORDS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo"), _QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2_WORDS),
    "qwen35": PreTokenizer(_splits(QWEN35), normalizer=_NFC),
    "tekken": PreTokenizer(_splits(TEKKEN), ignores_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "deepseek-coder": PreTokenizer(
        _splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE_AND_HANGUL, r"\p{N}")
    ),
    "falcon": PreTokenizer(FALCON_WORDS),
    **dict.fromkeys(
        ("poro-chat", "bloom", "gpt3-finnish"),
        PreTokenizer(
            _splits(" ?[^(\\s|.,!?…。，、।۔،)]+")  # noqa: RUF001 (the marks of other scripts)
        ),
    ),
}

# Vocabularies that are known by one token at its place, for files from before the key was there.
KNOWN_BY_TOKEN = {
    (128000, "<|begin_of_text|>"): "llama-bpe",
    (151643, "<|endoftext|>"): "qwen2",
}
