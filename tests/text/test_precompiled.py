"""A precompiled normaliser is walked before it is run: what passes never panics."""

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from jaxengine.text.precompiled import check_charsmap, check_tokenizer_json, is_panic
from jaxengine.text.tokenizer import load_tokenizer

TABLE = {"ﬁ": "fi", "é": "e", "①": "1", "Ａ": "A"}  # noqa: RUF001 (that they look alike is the point)
TEXTS = ("ﬁ é ① Ａ xyz", "".join(map(chr, range(1, 600))), "".join(map(chr, range(0x2400, 0x2500))))  # noqa: RUF001


def charsmap(table: dict[str, str]) -> bytes:
    """A table as SentencePiece writes it, with a block of 256 units for each node of the trie."""
    units, texts, nodes = [0] * 256 * 32, b"", {b"": 1}
    for key, value in table.items():
        path = key.encode()
        for end in range(1, len(path) + 1):
            nodes.setdefault(path[:end], len(nodes) + 1)
        units[256 * nodes[path]] = len(texts) | 1 << 31
        texts += value.encode() + b"\0"
    units[0] = 256 << 10
    for prefix, block in nodes.items():
        if prefix:
            place, has_leaf = 256 * nodes[prefix[:-1]] ^ prefix[-1], units[256 * block] != 0
            units[place] = (place ^ 256 * block) << 10 | has_leaf << 8 | prefix[-1]
    return struct.pack(f"<{len(units) + 1}I", 4 * len(units), *units) + texts


def tokenizer_json(content: bytes) -> dict[str, Any]:
    text = base64.b64encode(content).decode()
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Precompiled", "precompiled_charsmap": text}],
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }


def check(content: bytes) -> None:
    check_charsmap(base64.b64encode(content).decode(), Path("tokenizer.json"))


def test_the_table_of_these_tests_is_one_that_the_library_reads() -> None:
    content = charsmap(TABLE)
    check(content)
    normalizer = Tokenizer.from_str(json.dumps(tokenizer_json(content))).normalizer
    assert normalizer.normalize_str("ﬁ é ① Ａ x") == "fi e 1 A x"  # noqa: RUF001


def test_a_table_that_passes_never_panics() -> None:
    content = charsmap(TABLE)
    # Most units are empty: a flip there is seldom seen.
    used = [place for place, byte in enumerate(content) if byte]
    chance, passed = random.Random(0), 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            changed[chance.choice(used)] ^= 1 << chance.randrange(8)
        try:
            check(bytes(changed))
        except ValueError:
            continue
        passed += 1
        normalizer = Tokenizer.from_str(json.dumps(tokenizer_json(bytes(changed)))).normalizer
        for text in TEXTS:
            normalizer.normalize_str(text)
    assert 50 < passed < 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a trie of 0 bytes, 0 bytes are there"),
        (struct.pack("<I", 1 << 31) + bytes(8), "a trie of 2147483648 bytes, 8 bytes"),
        (struct.pack("<II", 4, 0) + b"abc\0", "points at unit 255 of 1"),
        (charsmap(TABLE)[:-1] + b"\xff", "a text that is no UTF-8"),
    ],
)
def test_a_table_of_wrong_bytes_says_what_is_wrong(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(content)


def test_a_tokenizer_with_such_a_table_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(b"\1\2\3")))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class":"PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: precompiled_charsmap has a trie"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        check_tokenizer_json(tmp_path / "tokenizer.json")


def test_a_panic_of_the_library_is_told_from_an_interrupt() -> None:
    with pytest.raises(BaseException, match="Precompiled") as raised:
        Tokenizer.from_str(json.dumps(tokenizer_json(b"\1\2\3")))
    assert is_panic(raised.value)
    assert not is_panic(KeyboardInterrupt())
