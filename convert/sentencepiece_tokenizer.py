"""Builds tokenizer.json where a checkpoint has a SentencePiece model alone.

What a family's own Python code would add (ChatGLM's prefix, special tokens behind its pieces) is
written down here: no code of a checkpoint is run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxengine.convert.errors import CheckpointError
from jaxengine.convert.json_file import parse_object
from jaxengine.convert.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)

Json = dict[str, Any]

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
SPACE = "\u2581"  # how SentencePiece writes a space
MAX_ADDED = 1 << 16  # tokens behind the pieces
OTHER_NAME = "<|{}|>"  # of a token that has the text of a piece

# ChatGLM 2 and 3 put these behind the pieces, in this order, and two of them before each text.
CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM_PREFIX = ("[gMASK]", "sop")
# The prompt of ChatGLM2's own ``build_prompt``, which has no template.
CHATGLM_TEMPLATE = (
    "[gMASK]sop{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}\n\n{% else %}[Round {{ loop.index0 // 2 + 1 }}]\n\n"
    "\u95ee\uff1a{{ message.content }}\n\n\u7b54\uff1a{% endif %}{% endfor %}"
)


def needs_tokenizer_json(files: Mapping[str, bytes]) -> bool:
    """Whether a checkpoint's files have a tokenizer.model and nothing that is read without it."""
    return MODEL in files and "tokenizer.json" not in files


def sentencepiece_files(files: Mapping[str, bytes], directory: Path) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json in place of a tokenizer.model.

    Args:
        files: The checkpoint's, as name -> content.
        directory: Where they lie, for messages.

    Raises:
        CheckpointError: If a file is damaged or of a kind that is not known.
    """
    config = parse_object(files[CONFIG], directory / CONFIG) if CONFIG in files else {}
    model = read_sentencepiece(files[MODEL], directory / MODEL)
    texts = _texts(model, directory / MODEL)
    added = _added_tokens(model, texts, config, directory / CONFIG)
    names = {
        "bos": _special(config, "bos", texts, model.bos_id),
        "eos": _special(config, "eos", texts, model.eos_id),
        "unk": texts[model.unk_id],
        "pad": _special(config, "pad", texts, -1),
    }
    before, after = _around(config, names, added, len(texts))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added[number] for number in sorted(added)],
        "normalizer": _normalizer(model),
        "pre_tokenizer": None,
        "post_processor": _post_processor(before, after, texts, added),
        "decoder": _decoder(model),
        "model": _model(model, texts),
    }
    made = {"tokenizer.json": tokenizer, CONFIG: _config(config, names, before)}
    templates = {name: content for name, content in files.items() if name.endswith(".jinja")}
    return templates | {
        name: json.dumps(value, ensure_ascii=False).encode() for name, value in made.items()
    }


def _is_chatglm(config: Json) -> bool:
    return config.get("tokenizer_class") == "ChatGLMTokenizer"


def _around(
    config: Json, names: Mapping[str, str | None], added: Mapping[int, Json], num_pieces: int
) -> tuple[list[str], list[str]]:
    """What stands before and behind each text."""
    if _is_chatglm(config):
        places = [num_pieces + CHATGLM_TOKENS.index(text) for text in CHATGLM_PREFIX]
        return [added[place]["content"] for place in places], []
    before = names["bos"] if config.get("add_bos_token", True) else None
    after = names["eos"] if config.get("add_eos_token", False) else None
    return [token for token in (before,) if token], [token for token in (after,) if token]


def implied_merges(pieces: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that pieces imply: each way to make one out of two others.

    SentencePiece joins the neighbours whose union has the best score; so the best score ranks
    first.

    Args:
        pieces: Scores of the normal pieces.
        ids: Of all; equal scores are in their order.
    """
    merges = []
    for piece in sorted(pieces, key=lambda text: (-pieces[text], ids[text])):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in pieces and right in pieces]
    return merges


def _texts(model: SentencePieceModel, path: Path) -> list[str]:
    texts = [piece.text for piece in model.pieces]
    if len(set(texts)) < len(texts) or "" in texts:
        raise CheckpointError(f"{path}: a piece is empty or there twice: fetch it again")
    if not 0 <= model.unk_id < len(texts):
        raise CheckpointError(
            f"{path}: the unknown token is {model.unk_id}, of {len(texts)} pieces: fetch it again"
        )
    return texts


def _model(model: SentencePieceModel, texts: list[str]) -> Json:
    has_bytes = any(piece.kind == BYTE for piece in model.pieces)
    if model.kind != BPE:
        return {
            "type": "Unigram",
            "unk_id": model.unk_id,
            "vocab": [[piece.text, piece.score] for piece in model.pieces],
            "byte_fallback": has_bytes,
        }
    ids = {text: number for number, text in enumerate(texts)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    return {
        "type": "BPE",
        "vocab": ids,
        "merges": implied_merges(normal, ids),
        "unk_token": texts[model.unk_id],
        "fuse_unk": True,
        "byte_fallback": has_bytes,
    }


def _normalizer(model: SentencePieceModel) -> Json:
    steps: list[Json] = []
    if model.charsmap:
        steps.append(
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(model.charsmap).decode(),
            }
        )
    if model.joins_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.adds_space:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: SentencePieceModel) -> Json:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _token(number: int, text: str, *, is_special: bool) -> Json:
    return {
        "id": number,
        "content": text,
        # "philosophy" has ChatGLM's "sop" in it.
        "single_word": is_special and text.isalpha(),
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def _added_tokens(
    model: SentencePieceModel, texts: list[str], config: Json, path: Path
) -> dict[int, Json]:
    """Tokens that are found in a text before it is cut into pieces, by id."""
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokens = {
        number: _token(number, piece.text, is_special=kinds[piece.kind])
        for number, piece in enumerate(model.pieces)
        if piece.kind in kinds
    }
    behind = {}
    if _is_chatglm(config):
        behind = {
            number: _token(number, text, is_special=True)
            for number, text in enumerate(CHATGLM_TOKENS, start=len(texts))
        }
    behind |= _config_tokens(config, len(texts), path)
    taken = set(texts)
    for number, token in behind.items():
        if number >= len(texts) and token["content"] in taken:
            # A piece of that text would be found in its place.
            token["content"] = OTHER_NAME.format(token["content"])
    return tokens | behind


def _config_tokens(config: Json, num_pieces: int, path: Path) -> dict[int, Json]:
    """Tokens that tokenizer_config.json lists beside the pieces."""
    tokens = {}
    for key, fields in (config.get("added_tokens_decoder") or {}).items():
        text = fields.get("content") if isinstance(fields, Mapping) else None
        if not str(key).isdecimal() or int(key) > num_pieces + MAX_ADDED or not text:
            raise CheckpointError(f"{path}: added_tokens_decoder has {key!r:.40}: an id is needed")
        tokens[int(key)] = _token(int(key), str(text), is_special=bool(fields.get("special")))
    return tokens


def _special(config: Json, name: str, texts: list[str], number: int) -> str | None:
    """A special token: the config's, as a text or an object, else the model's."""
    found = config.get(f"{name}_token")
    text = found.get("content") if isinstance(found, Mapping) else found
    if isinstance(text, str) and text:
        return text
    return texts[number] if 0 <= number < len(texts) else None


def _post_processor(
    before: list[str], after: list[str], texts: list[str], added: dict[int, Json]
) -> Json | None:
    if not before and not after:
        return None
    ids = {text: number for number, text in enumerate(texts)}
    ids |= {token["content"]: number for number, token in added.items()}
    unknown = [token for token in (*before, *after) if token not in ids]
    if unknown:
        raise CheckpointError(f"{CONFIG} names {unknown[0]!r:.40}, which is no token of the model")
    return {
        "type": "TemplateProcessing",
        "single": list(_template("A", before, after)),
        "pair": list(_template("AB", before, after)),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in (*before, *after)
        },
    }


def _template(letters: str, before: list[str], after: list[str]) -> Iterator[Json]:
    for number, letter in enumerate(letters):
        yield from ({"SpecialToken": {"id": token, "type_id": number}} for token in before)
        yield {"Sequence": {"id": letter, "type_id": number}}
        yield from ({"SpecialToken": {"id": token, "type_id": number}} for token in after)


def _config(config: Json, names: Mapping[str, str | None], before: list[str]) -> Json:
    """tokenizer_config.json, without what would run code or rebuild the tokenizer."""
    kept = {
        name: config[name]
        for name in ("chat_template", "model_max_length", "padding_side")
        if config.get(name) is not None
    }
    if _is_chatglm(config):
        template = str(kept.get("chat_template", CHATGLM_TEMPLATE))
        kept["chat_template"] = template.replace("".join(CHATGLM_PREFIX), "".join(before))
    tokens = {f"{name}_token": text for name, text in names.items() if text is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokens,
        **kept,
    }
