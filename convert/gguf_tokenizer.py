"""Rebuilds tokenizer.json and tokenizer_config.json from the metadata of a GGUF file."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

from gguf import Keys
from jaxengine.convert.errors import CheckpointError, check_unique, shown
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.gguf_special_tokens import control_ids, special_ids
from jaxengine.convert.pretokenizers import (
    DEFAULT,
    KNOWN_BY_TOKEN,
    PRE_TOKENIZERS,
    byte_level,
)
from jaxengine.convert.sentencepiece_tokenizer import implied_merges

Json = dict[str, Any]
Tokenizer = Keys.Tokenizer

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # how SentencePiece writes a space
MAX_PIECE_LENGTH = 1024  # characters of a SentencePiece piece; known ones have some tens


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, read once.

    Attributes:
        metadata: The keys of the file.
        ids: Every token with its id, in the order of the ids.
        kinds: The type of each token.
        special: Text of bos, eos, unk and pad, as far as there is one.
    """

    metadata: Metadata
    ids: dict[str, int]
    kinds: list[int]
    special: dict[str, str]

    @classmethod
    def read(cls, metadata: Metadata) -> _Vocabulary:
        """Check and read the tokens.

        Raises:
            CheckpointError: If a token is there twice, or a list is too short.
        """
        found = metadata.items(Tokenizer.LIST, str) or []
        # As llama.cpp names them: an empty token would be found everywhere.
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(found)]
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            check_unique(tokens, metadata.path, f"the token of {Tokenizer.LIST}")
        special = {name: tokens[number] for name, number in special_ids(metadata).items()}
        return cls(metadata, ids, _kinds(metadata, len(tokens)), special)


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """The tokenizer as file name -> content.

    Raises:
        CheckpointError: If the file has no tokenizer, a damaged one, or one of a kind that is not
            known: ids that are only nearly right would be worse.
    """
    kind = metadata.text(Tokenizer.MODEL)
    if kind is None or metadata.get(Tokenizer.LIST) is None:
        raise CheckpointError(
            f"the GGUF file {metadata.path} has no tokenizer: pass tokenizer= a directory that has "
            "one"
        )
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"the tokenizer of the GGUF file {metadata.path} is of kind {kind!r:.80}; supported: "
            "gpt2 (BPE), llama (SentencePiece). Pass tokenizer= a directory that has tokenizer.json"
        )
    vocabulary = _Vocabulary.read(metadata)
    tokenizer = _bpe(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": _config(vocabulary)}
    return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}


def _bpe(vocabulary: _Vocabulary) -> Json:
    metadata = vocabulary.metadata
    name = _pre_tokenizer_name(vocabulary)
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"the pre-tokeniser of the GGUF file {metadata.path} is {name!r:.80}; known: "
            f"{', '.join(PRE_TOKENIZERS)}. Pass tokenizer= a directory that has tokenizer.json"
        )
    pre = PRE_TOKENIZERS[name]
    merges = _stored_merges(metadata)
    if merges is None:
        raise CheckpointError(f"{metadata.path} lacks {Tokenizer.MERGES}: it is damaged")
    model = {
        "type": "BPE",
        "vocab": vocabulary.ids,
        "merges": merges,
        "ignore_merges": pre.ignores_merges,
    }
    return _tokenizer_json(
        vocabulary,
        model,
        normalizer=pre.normalizer,
        pre_tokenizer=pre.steps,
        decoder=byte_level(use_regex=True),
        adds_bos=metadata.flag(Tokenizer.ADD_BOS, pre.adds_bos),
    )


def _pre_tokenizer_name(vocabulary: _Vocabulary) -> str:
    """The file's name for it; of a file from before May 2024, which has none, a guess."""
    metadata = vocabulary.metadata
    name = metadata.text(Tokenizer.PRE)
    if name:
        return name
    known = (
        name
        for (number, text), name in KNOWN_BY_TOKEN.items()
        if vocabulary.ids.get(text) == number
    )
    guess = next(known, DEFAULT)
    warnings.warn(
        f"{metadata.path} lacks {Tokenizer.PRE}, the name of its pre-tokeniser; {guess!r} is used"
        + (", which may not be the model's: answers may get worse" if guess == DEFAULT else "")
        + ". Convert the model again, or pass tokenizer= a directory that has tokenizer.json",
        stacklevel=2,
    )
    return guess


def _sentencepiece(vocabulary: _Vocabulary) -> Json:
    metadata = vocabulary.metadata
    model = {
        "type": "BPE",
        "vocab": vocabulary.ids,
        "merges": _stored_merges(metadata) or _merges(vocabulary),
        "unk_token": vocabulary.special.get("unk"),
        "fuse_unk": True,
        "byte_fallback": True,
    }
    adds_space = metadata.flag(Tokenizer.ADD_PREFIX, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    return _tokenizer_json(
        vocabulary,
        model,
        normalizer=_sequence("normalizers", [*before, replace]),
        pre_tokenizer=None,
        decoder=_sequence(
            "decoders", [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
        ),
        adds_bos=metadata.flag(Tokenizer.ADD_BOS, True),
    )


def _stored_merges(metadata: Metadata) -> list[list[str]] | None:
    merges = metadata.items(Tokenizer.MERGES, str)
    if not merges:
        return None if merges is None else []
    # A merge may begin with a space of its own, so the separator is not the first character.
    cuts = [merge.find(" ", 1) for merge in merges]
    for merge, cut in zip(merges, cuts, strict=True):
        if cut < 0:
            raise CheckpointError(
                f"{metadata.path}: {Tokenizer.MERGES} has the entry {shown(merge)}, expected two "
                "tokens with a space between: the file is damaged"
            )
    return [[merge[:cut], merge[cut + 1 :]] for merge, cut in zip(merges, cuts, strict=True)]


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies."""
    metadata, ids = vocabulary.metadata, vocabulary.ids
    scores = metadata.items(Tokenizer.SCORES, int, float, least=len(ids))
    if scores is None:
        raise CheckpointError(f"{metadata.path} lacks {Tokenizer.SCORES}: it is damaged")
    pieces = {
        token: score
        for token, score, kind in zip(ids, scores, vocabulary.kinds, strict=False)
        if kind == NORMAL
    }
    longest = max(map(len, pieces), default=0)
    if longest > MAX_PIECE_LENGTH:
        raise CheckpointError(
            f"{metadata.path}: {Tokenizer.LIST} has a piece of {longest} characters, at most "
            f"{MAX_PIECE_LENGTH} are possible: the file is damaged"
        )
    return implied_merges(pieces, ids)


def _tokenizer_json(
    vocabulary: _Vocabulary,
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
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(vocabulary, adds_bos),
        "decoder": decoder,
        "model": model,
    }


def _kinds(metadata: Metadata, num_tokens: int) -> list[int]:
    """The type of each token; what is a control token by its text is one."""
    found = metadata.items(Tokenizer.TOKEN_TYPE, int, least=num_tokens)
    kinds = [NORMAL] * num_tokens if found is None else list(found[:num_tokens])
    for number in control_ids(metadata):
        if kinds[number] in (NORMAL, USER_DEFINED):
            kinds[number] = CONTROL
    return kinds


def _added_tokens(vocabulary: _Vocabulary) -> list[Json]:
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
        for (token, i), kind in zip(vocabulary.ids.items(), vocabulary.kinds, strict=True)
        if kind in kinds
    ]


def _post_processor(vocabulary: _Vocabulary, adds_bos: bool) -> Json | None:
    bos, eos = vocabulary.special.get("bos"), vocabulary.special.get("eos")
    adds_eos = vocabulary.metadata.flag(Tokenizer.ADD_EOS, False)
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

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]}
            for token in (*before, *after)
        },
    }


def _config(vocabulary: _Vocabulary) -> Json:
    """tokenizer_config.json."""
    metadata = vocabulary.metadata
    names = ("bos", "eos", "unk", "pad")
    tokens = {f"{name}_token": vocabulary.special.get(name) for name in names}
    config = {
        # The class that takes tokenizer.json as it is; a model's own class would rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "chat_template": _chat_templates(metadata),
        "model_max_length": metadata.integer(Keys.LLM.CONTEXT_LENGTH, None, low=1),
        "clean_up_tokenization_spaces": False,
    }
    return {key: value for key, value in config.items() if value is not None}


def _chat_templates(metadata: Metadata) -> str | list[Json] | None:
    """The chat template; a list of named ones where the file has several."""
    default = metadata.text(Tokenizer.CHAT_TEMPLATE)
    names = metadata.items(Tokenizer.CHAT_TEMPLATES, str) or []
    named = {
        name: metadata.text(Tokenizer.CHAT_TEMPLATE_N.replace("{name}", name)) for name in names
    }
    templates = {"default": default, **named}
    if not any(named.values()):
        return default
    return [
        {"name": name, "template": template} for name, template in templates.items() if template
    ]


def _sequence(kind: str, parts: list[Json]) -> Json:
    return {"type": "Sequence", kind: parts}
