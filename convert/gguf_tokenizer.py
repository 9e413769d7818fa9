"""Rebuilds tokenizer.json and tokenizer_config.json from the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.convert.pretokenizers import NFC_MODELS, PRE_TOKENIZERS, byte_level

Metadata = Mapping[str, Any]
Json = dict[str, Any]

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # how SentencePiece writes a space

# llama.cpp's defaults where the file has no add_bos_token.
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe")


def generation_config(metadata: Metadata) -> Json:
    """generation_config.json: the ids of bos, eos (a list if there are several) and pad."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    config = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """The tokenizer as file name -> content.

    Raises:
        ValueError: If the file has no tokenizer, or one of a kind that is not known: ids that
            are only nearly right would be worse.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if "tokenizer.ggml.tokens" not in metadata or kind is None:
        raise ValueError("the GGUF file has no tokenizer: pass tokenizer= a directory that has one")
    if kind == "gpt2":
        tokenizer = _bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise ValueError(
            f"the GGUF file's tokenizer is of kind {kind!r}; supported: gpt2 (BPE), llama "
            "(SentencePiece). Pass tokenizer= a directory that has tokenizer.json"
        )
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": _config(metadata)}
    return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}


def _bpe(metadata: Metadata) -> Json:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"the GGUF file's pre-tokeniser is {pre!r}; known: {', '.join(PRE_TOKENIZERS)}. Pass "
            "tokenizer= a directory that has tokenizer.json"
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise ValueError("the GGUF file lacks tokenizer.ggml.merges: it is damaged")
    model = {
        "type": "BPE",
        "vocab": _vocabulary(metadata),
        "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        # Llama 3 takes a word that is in the vocabulary whole, even if no merges lead to it.
        "ignore_merges": pre in ("tekken", *BOS_BY_DEFAULT),
    }
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", pre in BOS_BY_DEFAULT)
    return _tokenizer_json(
        metadata,
        model,
        normalizer={"type": "NFC"} if pre in NFC_MODELS else None,
        pre_tokenizer=PRE_TOKENIZERS[pre],
        decoder=byte_level(use_regex=True),
        adds_bos=adds_bos,
    )


def _sentencepiece(metadata: Metadata) -> Json:
    vocab = _vocabulary(metadata)
    stored = metadata.get("tokenizer.ggml.merges")
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [merge.split(" ", 1) for merge in stored] if stored else _merges(metadata),
        "unk_token": _token(metadata, "unknown"),
        "fuse_unk": True,
        "byte_fallback": True,
    }
    adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    return _tokenizer_json(
        metadata,
        model,
        normalizer=_sequence("normalizers", [*before, replace]),
        pre_tokenizer=None,
        decoder=_sequence(
            "decoders", [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
        ),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token", True),
    )


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    """The merges a SentencePiece vocabulary implies: each way to make a piece out of two others.

    SentencePiece joins the neighbours whose union has the best score; so the best score ranks
    first.
    """
    tokens, kinds = metadata["tokenizer.ggml.tokens"], _kinds(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise ValueError("the GGUF file lacks tokenizer.ggml.scores: it is damaged")
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == NORMAL
    }
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for piece in sorted(pieces, key=lambda token: (-pieces[token], ids[token])):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in pieces and right in pieces]
    return merges


def _tokenizer_json(
    metadata: Metadata,
    model: Json,
    *,
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    adds_bos: bool,
) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(metadata, adds_bos),
        "decoder": decoder,
        "model": model,
    }


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    return {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _kinds(metadata: Metadata) -> Sequence[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)


def _added_tokens(metadata: Metadata) -> list[Json]:
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[kind],
        }
        for i, (token, kind) in enumerate(
            zip(metadata["tokenizer.ggml.tokens"], _kinds(metadata), strict=True)
        )
        if kind in kinds
    ]


def _post_processor(metadata: Metadata, adds_bos: bool) -> Json | None:
    bos, eos = _token(metadata, "bos"), _token(metadata, "eos")
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [bos] if adds_bos and bos is not None else []
    after = [eos] if adds_eos and eos is not None else []
    if not before and not after:
        return None

    def template(letters: str) -> list[Json]:
        parts: list[Json] = []
        for letter, number in zip(letters, range(2), strict=False):
            parts += [{"SpecialToken": {"id": token, "type_id": number}} for token in before]
            parts.append({"Sequence": {"id": letter, "type_id": number}})
            parts += [{"SpecialToken": {"id": token, "type_id": number}} for token in after]
        return parts

    ids = _vocabulary(metadata)
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in (*before, *after)
        },
    }


def _config(metadata: Metadata) -> Json:
    """tokenizer_config.json."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = {f"{short}_token": _token(metadata, name) for short, name in names.items()}
    architecture = metadata.get("general.architecture")
    config = {
        # The class that takes tokenizer.json as it is; a model's own class would rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "model_max_length": metadata.get(f"{architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    return {key: value for key, value in config.items() if value is not None}


def _token(metadata: Metadata, name: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = metadata["tokenizer.ggml.tokens"]
    return tokens[number] if number is not None and 0 <= number < len(tokens) else None


def _sequence(kind: str, parts: list[Json]) -> Json:
    return {"type": "Sequence", kind: parts}
