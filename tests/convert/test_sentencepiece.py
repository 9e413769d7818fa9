"""A tokenizer.model alone is read, and its tokens are those that SentencePiece would choose."""

import itertools
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from jaxengine.convert import open_checkpoint
from jaxengine.convert.checkpoint import write_sentencepiece_tokenizer
from jaxengine.convert.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNIGRAM, UNKNOWN

from jaxengine import SamplingParams
from jaxengine.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers import make_llm
from tests.models.numpy_cases import CHATGLM
from tests.models.numpy_models import save_numpy_model

# "l" + "l" ranks before "h" + "e", and so on: what is joined first follows from the scores alone.
NORMAL_PIECES = ("ll", "▁h", "he", "ello", "ell", "▁he", "▁hello", "so", "sop", "▁▁", "ph", "▁ph")
LETTERS = "▁helophisy"
Pieces = list[tuple[str, float, int]]


def pieces_of(*normal: str) -> Pieces:
    """Unknown, two control tokens, 256 bytes, then letters and what is made of them."""
    bytes_ = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = [(letter, -100.0, NORMAL) for letter in dict.fromkeys(LETTERS)]
    made = [(piece, -float(rank), NORMAL) for rank, piece in enumerate(normal)]
    control = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    return [*control, *bytes_, *letters, *made]


PIECES = pieces_of(*NORMAL_PIECES)


def varint(value: int) -> bytes:
    if value < 0:
        value += 1 << 64
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: Pieces, kind: int = BPE, **normalizer: int) -> bytes:
    """A tokenizer.model, written as its message definition says."""
    numbers = {"adds_space": 3, "joins_spaces": 4}
    content = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind_of_piece))
        for text, score, kind_of_piece in pieces
    )
    content += field(2, field(3, kind) + field(43, -1))
    settings = {"joins_spaces": 0, **normalizer}
    return content + field(3, b"".join(field(numbers[n], v) for n, v in settings.items()))


def save(directory: Path, content: bytes, **config: Any) -> Path:
    (directory / "tokenizer.model").write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path, content: bytes, **config: Any) -> Tokenizer:
    made = directory / "made"
    made.mkdir()
    assert write_sentencepiece_tokenizer(save(directory, content, **config), made)
    return load_tokenizer(made)


def by_best_pair(text: str, pieces: Pieces) -> list[str]:
    """SentencePiece's BPE, slow and obvious: join the best pair of neighbours while any is one."""
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        ranked = [(scores[text], -i) for i, text in enumerate(joined) if text in scores]
        if not ranked:
            return parts
        first = -max(ranked)[1]
        parts[first : first + 2] = [parts[first] + parts[first + 1]]


def texts_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    backend: tokenizers.Tokenizer = tokenizer.hf_tokenizer.backend_tokenizer
    return [str(backend.id_to_token(token_id)) for token_id in token_ids]


@pytest.mark.parametrize(
    "text", ["hello", "hello  philosophy", "sosop", " he", "hellllo hehe", "", "h", "eeelll"]
)
def test_pieces_are_joined_by_their_scores(tmp_path: Path, text: str) -> None:
    tokenizer = load(tmp_path, sentencepiece_model(PIECES), add_bos_token=False)
    found = texts_of(tokenizer, tokenizer.encode(text))
    assert found == (by_best_pair(text, PIECES) if text else [])


def test_what_no_piece_covers_comes_in_bytes_and_back(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, sentencepiece_model(PIECES))
    token_ids = tokenizer.encode("hello 你")
    assert texts_of(tokenizer, token_ids) == [
        *("<s>", "▁hello", "▁", "<0xE4>", "<0xBD>", "<0xA0>"),
    ]
    assert tokenizer.decode(token_ids) == "hello 你"


def test_a_unigram_model_takes_the_likeliest_pieces(tmp_path: Path) -> None:
    # "he" + "ll" + "o" costs 1 + 1 + 9, "hell" + "o" costs 5 + 9.
    made = [("▁", -2.0), ("he", -1.0), ("ll", -1.0), ("hell", -5.0), ("o", -9.0)]
    pieces = [*PIECES[:259], *((text, score, NORMAL) for text, score in made)]
    tokenizer = load(tmp_path, sentencepiece_model(pieces, UNIGRAM), add_bos_token=False)
    assert texts_of(tokenizer, tokenizer.encode("hello")) == ["▁", "he", "ll", "o"]


@pytest.mark.parametrize(
    ("normalizer", "tokens"),
    [
        ({}, ["▁▁", "▁he"]),
        ({"adds_space": 0}, ["▁", "▁he"]),
        ({"joins_spaces": 1}, ["▁he"]),
    ],
)
def test_spaces_are_treated_as_the_model_says(
    tmp_path: Path, normalizer: dict[str, int], tokens: list[str]
) -> None:
    tokenizer = load(tmp_path, sentencepiece_model(PIECES, **normalizer), add_bos_token=False)
    assert texts_of(tokenizer, tokenizer.encode("  he")) == tokens


def test_flags_of_the_config_say_what_stands_around_a_text(tmp_path: Path) -> None:
    config = {"add_bos_token": False, "add_eos_token": True, "eos_token": {"content": "</s>"}}
    tokenizer = load(tmp_path, sentencepiece_model(PIECES), **config)
    assert texts_of(tokenizer, tokenizer.encode("he")) == ["▁he", "</s>"]
    assert tokenizer.eos_token_ids == {2}


def test_tokens_behind_the_pieces_come_from_the_config(tmp_path: Path) -> None:
    added = {str(len(PIECES)): {"content": "<|im_end|>", "special": True}}
    tokenizer = load(tmp_path, sentencepiece_model(PIECES), added_tokens_decoder=added)
    assert tokenizer.encode("he<|im_end|>")[-1] == len(PIECES)
    assert tokenizer.decode([len(PIECES)]) == ""


def test_chatglms_prefix_stands_before_each_text(tmp_path: Path) -> None:
    content = sentencepiece_model(PIECES)
    tokenizer = load(tmp_path, content, tokenizer_class="ChatGLMTokenizer", auto_map={"x": "y.Z"})
    first = len(PIECES)
    assert tokenizer.encode("he")[:2] == [first + 1, first + 3]
    assert texts_of(tokenizer, tokenizer.encode("philosophy")) == [
        # The piece "sop" is another token than what stands before a text.
        *("[gMASK]", "<|sop|>", "▁ph", "i", "l", "o", "sop", "h", "y"),
    ]
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert tokenizer.render_chat(conversation) == (
        "[gMASK]<|sop|>[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："  # noqa: RUF001
    )
    assert tokenizer.encode_chat(conversation)[:2] == [first + 1, first + 3]


def test_chatglms_prefix_is_found_in_a_text_only_as_a_word(tmp_path: Path) -> None:
    content = sentencepiece_model(pieces_of("ph"))
    tokenizer = load(tmp_path, content, tokenizer_class="ChatGLMTokenizer")
    sop = tokenizer.encode("")[1]
    assert tokenizer.encode("philosophy").count(sop) == 1
    assert tokenizer.encode("[gMASK]sop[", add_special_tokens=False)[1] == sop


@pytest.fixture(scope="module")
def chatglm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ChatGLM2 in the layout of its publisher, with code that must not run."""
    directory = tmp_path_factory.mktemp("chatglm2")
    save(directory, sentencepiece_model(pieces_of("▁he", "ll")), tokenizer_class="ChatGLMTokenizer",
         auto_map={"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]})  # fmt: skip
    config = {**CHATGLM, "padded_vocab_size": 320, "model_type": "chatglm", "eos_token_id": 2}
    config["auto_map"] = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    save_numpy_model(directory, "ChatGLMModel", config)
    for name in ("tokenization_chatglm.py", "configuration_chatglm.py", "modeling_chatglm.py"):
        (directory / name).write_text("raise SystemExit('code of the checkpoint has run')")
    return directory


def test_the_tutorials_script_runs_on_chatglm2s_layout(chatglm2: Path) -> None:
    llm = make_llm(chatglm2, tokenizer=str(chatglm2), max_model_len=64)
    outputs = llm.generate(["he", "hello"], SamplingParams(max_tokens=5, temperature=0.8))
    assert [len(output.outputs) for output in outputs] == [1, 1]
    assert all(isinstance(output.outputs[0].text, str) for output in outputs)
    number = len(pieces_of("▁he", "ll"))
    assert list(outputs[0].prompt_token_ids or [])[:2] == [number + 1, number + 3]


def test_a_checkpoint_writes_the_same_tokenizer(chatglm2: Path, tmp_path: Path) -> None:
    open_checkpoint(chatglm2).write_tokenizer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    number = len(pieces_of("▁he", "ll"))
    assert load_tokenizer(tmp_path).encode("he")[:2] == [number + 1, number + 3]


GOOD = sentencepiece_model(PIECES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no SentencePiece model .it has no pieces"),
        (b"IQ== 0\nIg== 1\n" * 20, "is no SentencePiece model"),
        (GOOD[: len(GOOD) // 2], "is no SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\x0f", "a field of 4294967295 bytes, 0 follow"),
        (sentencepiece_model(PIECES, kind=3), "of type 3, supported are 1"),
        (sentencepiece_model([*PIECES, ("he", 0.0, NORMAL)]), "a piece is empty or there twice"),
        (sentencepiece_model([("x" * 2000, 0.0, NORMAL)]), "a piece has 2000 characters, at most"),
        (field(1, 7), "an integer where it should be bytes"),
        (sentencepiece_model(PIECES) + field(2, field(40, 9999)), "the unknown token is 9999, of"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "<begin>"}, "names '<begin>', which is no token"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder has 'x'"),
        (
            {"added_tokens_decoder": {"999999999": {"content": "a"}}},
            "added_tokens_decoder has '9999",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, GOOD, **config)
