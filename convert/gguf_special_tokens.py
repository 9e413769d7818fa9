"""Which tokens of a GGUF file's vocabulary begin a text, end one, pad, and stand for the unknown.

A file may leave an id out; what it then is depends on the kind of vocabulary. Beside eos, a model
may end its turn with another token, which old files do not name: llama.cpp knows it by its text.
Source of defaults and texts: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import Keys
from jaxengine.convert.gguf_metadata import Metadata

Tokenizer = Keys.Tokenizer

# By tokenizer.ggml.model, where the file has no id of its own.
DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "gpt2": {"bos": 11, "eos": 11},
    "bert": {"bos": 101, "unk": 100, "pad": 0},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}
# Pre-tokenisers whose models have no bos, whatever the kind says.
WITHOUT_BOS = ("glm4", "chatglm-bpe")

KEYS = {
    "bos": Tokenizer.BOS_ID,
    "eos": Tokenizer.EOS_ID,
    "unk": Tokenizer.UNK_ID,
    "pad": Tokenizer.PAD_ID,
    "eot": Tokenizer.EOT_ID,
    "eom": Tokenizer.EOM_ID,
    "fim_pad": Tokenizer.FIM_PAD_ID,
    "fim_rep": Tokenizer.FIM_REP_ID,
    "fim_sep": Tokenizer.FIM_SEP_ID,
}

# Texts that end a generation.
END_TEXTS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>"),
    *("<|flush|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<|endoftext|>", "</s>"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<｜end▁of▁sentence｜>", "[e~["),  # noqa: RUF001 (DeepSeek's own bars)
)
# Texts of what separates files in a prompt to fill in; a model that writes one has finished too.
FILL_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def special_ids(metadata: Metadata) -> dict[str, int]:
    """The ids of ``KEYS`` that the file has or that follow from its kind of vocabulary.

    Raises:
        CheckpointError: If one is no integer.
    """
    kind = metadata.text(Tokenizer.MODEL)
    tokens = metadata.items(Tokenizer.LIST, str)
    num_tokens = 1 << 31 if tokens is None else len(tokens)
    defaults = dict(DEFAULT_IDS.get(kind or "", {})) if tokens is not None else {}
    if metadata.text(Tokenizer.PRE) in WITHOUT_BOS:
        defaults.pop("bos", None)
    ids = {}
    for name, key in KEYS.items():
        stored = metadata.integer(key, None, low=-(1 << 32), high=1 << 32)
        # An id outside the vocabulary counts as none, as -1 does.
        possible = [
            i for i in (stored, defaults.get(name)) if i is not None and 0 <= i < num_tokens
        ]
        if possible:
            ids[name] = possible[0]
    return ids


def end_ids(metadata: Metadata) -> list[int]:
    """Every token that ends a generation, eos first."""
    ids, by_text = special_ids(metadata), _ids_by_text(metadata)
    fill = [
        ids.get(name, next((by_text[text] for text in texts if text in by_text), None))
        for name, texts in FILL_TEXTS.items()
    ]
    named = [ids.get(name) for name in ("eos", "eot", "eom")]
    found = sorted(by_text[text] for text in END_TEXTS if text in by_text)
    going_on = {by_text.get(text) for text in _texts_that_go_on(by_text)}
    ends = dict.fromkeys((*named, *found, *fill))
    return [i for i in ends if i is not None and i not in going_on]


def _ids_by_text(metadata: Metadata) -> Mapping[str, int]:
    tokens = metadata.items(Tokenizer.LIST, str) or []
    return {token: number for number, token in enumerate(tokens)}


def _texts_that_go_on(by_text: Mapping[str, int]) -> list[str]:
    """The texts of ``END_TEXTS`` that end nothing in this vocabulary."""
    texts = []
    # Harmony and Solar end a message with <|end|>, and go on with the next one.
    if {"<|return|>", "<|call|>"} <= by_text.keys() or (
        "<|flush|>" in by_text and by_text.keys() & {"<|call|>", "<|calls|>"}
    ):
        texts.append("<|end|>")
    if "<|tool_response>" in by_text:  # Gemma 4's vocabulary has </s> as a tag of HTML
        texts.append("</s>")
    return texts


def control_ids(metadata: Metadata) -> frozenset[int]:
    """Tokens that are control tokens by their text, whatever type the file gives them."""
    by_text = _ids_by_text(metadata)
    fill = (text for texts in FILL_TEXTS.values() for text in texts)
    going_on = _texts_that_go_on(by_text)
    texts = [text for text in (*END_TEXTS, *fill) if text not in going_on]
    return frozenset(by_text[text] for text in texts if text in by_text)


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """generation_config.json: the ids of bos, of what ends (a list if several) and of pad."""
    ids, ends = special_ids(metadata), end_ids(metadata)
    config = {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("pad"),
    }
    return {key: value for key, value in config.items() if value is not None}
