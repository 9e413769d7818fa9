import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxengine.convert import Checkpoint, open_checkpoint
from jaxengine.convert.gguf_file import read_gguf
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.gguf_special_tokens import generation_config
from jaxengine.convert.gguf_tokenizer import tokenizer_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from tests.convert.tiny_gguf import demo_model, finish

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CORPUS = [
    "In 2024, 12345 apples cost $67.89! The cat sat on the mat; the hat is that.",
    "Steps:\n\n1. Mix\n2. Bake\n\n  indented   words, don't I'll we've THEY'RE",
    "naïve café 東京 🚀",
] * 4


def rebuilt(tmp_path: Path, model: str, tokens: list[str], **metadata: Any) -> Tokenizer:
    return Tokenizer.from_str(files(tmp_path, model, tokens, **metadata)["tokenizer.json"].decode())


def files(tmp_path: Path, model: str, tokens: list[str], **metadata: Any) -> dict[str, bytes]:
    """What comes out of a GGUF file with this tokenizer; a list is written as token metadata."""
    path = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    return tokenizer_files(Metadata(path, read_gguf(finish(writer, path)).metadata, "llama"))


SPLITS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


def train(split: PreTokenizer) -> tuple[Tokenizer, list[str], list[str]]:
    """A byte-level BPE tokenizer, its tokens by id, its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    return tokenizer, tokens, [" ".join(merge) for merge in content["merges"]]


@pytest.fixture(scope="module", params=sorted(SPLITS))
def bpe_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    original, tokens, merges = train(SPLITS[request.param])
    found = rebuilt(
        tmp_path_factory.mktemp("bpe"),
        "gpt2",
        tokens,
        tokenizer_pre=request.param,
        token_merges=merges,
        token_types=[CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
    )
    return original, found


PIECES = ["the", "The", " ", "  ", "\n", "1", "2024", " 5", "'ll", "é", "東", "🚀", "!", "x", "<|im_end|>"]  # fmt: skip  # noqa: E501


@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_a_rebuilt_bpe_tokenizer_gives_the_ids_of_the_original(
    bpe_pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    original, found = bpe_pair
    ids = original.encode(text).ids
    assert found.encode(text).ids == ids
    assert found.decode(ids) == original.decode(ids)


# One merge, because GGUFWriter leaves out empty lists.
BYTES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "qq"]
MERGES = ["q q"]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "x  12 y", ["x", "ĠĠ", "1", "2", "Ġy"]),
        ("gpt-2", "x  12 y", ["x", "Ġ", "Ġ12", "Ġy"]),
        ("default", "a 12345!x", ["a", "Ġ", "123", "45", "!", "x"]),
        ("llama-bpe", "a 12345\n\nIt'S", ["a", "Ġ", "123", "45", "ĊĊ", "It", "'S"]),
        ("qwen2", "a 123 I'LL", ["a", "Ġ", "1", "2", "3", "ĠI", "'LL"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
    ],
)
def test_each_pre_tokeniser_cuts_words_as_its_model_does(
    tmp_path: Path, pre: str, text: str, words: list[str]
) -> None:
    tokenizer = rebuilt(tmp_path, "gpt2", BYTES, tokenizer_pre=pre, token_merges=MERGES)
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in cut] == words


def test_qwen2_normalises_to_nfc_and_others_do_not(tmp_path: Path) -> None:
    decomposed = "e\u0301"
    for pre, expected in (("qwen2", ["Ã", "©"]), ("smollm", ["e", "Ì", "ģ"])):
        tokenizer = rebuilt(tmp_path, "gpt2", BYTES, tokenizer_pre=pre, token_merges=MERGES)
        assert tokenizer.encode(decomposed).tokens == expected


def test_llama3_takes_whole_words_of_the_vocabulary_that_no_merge_makes(tmp_path: Path) -> None:
    tokens = [*BYTES, "hello"]
    llama3 = rebuilt(tmp_path, "gpt2", tokens, tokenizer_pre="llama-bpe", token_merges=MERGES)
    smollm = rebuilt(tmp_path, "gpt2", tokens, tokenizer_pre="smollm", token_merges=MERGES)
    assert llama3.encode("hello", add_special_tokens=False).tokens == ["hello"]
    assert smollm.encode("hello").tokens == list("hello")


def test_an_unknown_pre_tokeniser_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pre-tokeniser of .* is 'klingon'; known: default, gpt-2"
    ):
        files(tmp_path, "gpt2", BYTES, tokenizer_pre="klingon", token_merges=MERGES)


def test_a_bpe_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.merges"):
        files(tmp_path, "gpt2", BYTES, tokenizer_pre="smollm")


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of kind 'rwkv'; supported: gpt2"):
        files(tmp_path, "rwkv", ["a"])


def test_a_file_without_tokenizer_is_told_what_to_pass() -> None:
    with pytest.raises(ValueError, match="has no tokenizer: pass tokenizer="):
        tokenizer_files(Metadata(Path("m.gguf"), {}))


@pytest.mark.parametrize(
    ("pre", "metadata", "expected"),
    [
        ("smollm", {}, ["a"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos_token": False, "add_eos_token": True}, ["a", "</s>"]),
    ],
)
def test_bos_and_eos_are_added_as_the_metadata_or_the_default_says(
    tmp_path: Path, pre: str, metadata: dict[str, bool], expected: list[str]
) -> None:
    tokens = ["<s>", "</s>", *BYTES]
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    tokenizer = rebuilt(
        tmp_path, "gpt2", tokens, tokenizer_pre=pre, token_merges=MERGES, **ids, **metadata
    )
    assert tokenizer.encode("a").tokens == expected
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


SPACE = "\u2581"
SPM_SPECIAL = ["<unk>", "<s>", "</s>"]
SPM_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPM_PIECES = [f"{SPACE}t", "he", f"{SPACE}the", "in", f"{SPACE}in", "ing", SPACE, *"theinga"]


def spm_reference(text: str) -> list[str]:
    """SentencePiece's BPE: join the neighbours whose union has the best score, leftmost first."""
    scores = {piece: -float(i) for i, piece in enumerate(SPM_PIECES)}
    symbols = list((SPACE + text).replace(" ", SPACE))
    while True:
        pairs = [
            (scores[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in scores
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [
        token
        for symbol in symbols
        for token in (
            [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        )
    ]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokens = [*SPM_SPECIAL, *SPM_BYTES, *SPM_PIECES]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(SPM_PIECES)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(SPM_PIECES))]
    return rebuilt(
        tmp_path_factory.mktemp("spm"),
        "llama",
        tokens,
        token_types=kinds,
        token_scores=scores,
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="theinga é", min_size=1, max_size=12))
def test_a_sentencepiece_vocabulary_joins_by_best_score_and_falls_back_to_bytes(
    spm: Tokenizer, text: str
) -> None:
    assert spm.encode(text, add_special_tokens=False).tokens == spm_reference(text)


def test_a_sentencepiece_tokenizer_starts_with_bos_and_decodes_to_the_same_text(
    spm: Tokenizer,
) -> None:
    encoding = spm.encode("the thing é")
    assert encoding.tokens[0] == "<s>"
    assert spm.decode(encoding.ids) == "the thing é"


def test_generation_config_lists_both_ends_where_there_are_two() -> None:
    ids = {"bos": 0, "eos": 5, "eot": 7, "padding": 9}
    metadata = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()}
    expected = {"bos_token_id": 0, "eos_token_id": [5, 7], "pad_token_id": 9}
    assert generation_config(Metadata(Path("m.gguf"), metadata)) == expected


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(demo_model())


@pytest.fixture(scope="module")
def demo_tokenizer(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("demo")
    demo.write_tokenizer(directory)
    # With a config beside it, transformers must still take tokenizer.json as it is.
    (directory / "config.json").write_text(json.dumps(demo.hf_config))
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "In 2024, 12345 apples cost $67.89!",
            [
                788,
                216,
                34,
                32,
                34,
                36,
                28,
                216,
                33,
                34,
                35,
                36,
                37,
                13855,
                1708,
                1885,
                38,
                39,
                30,
                40,
                41,
                17,
            ],
        ),
        ("Steps:\n\n1. Mix\n2. Bake", [21831, 42, 1116, 33, 30, 18212, 198, 34, 30, 47393]),
        ("x  5 y", [104, 256, 37, 329]),
        (
            "naïve café 東京 🚀 don't I'll",
            [
                3546,
                46494,
                37366,
                17097,
                247,
                126,
                16736,
                122,
                15107,
                244,
                218,
                1326,
                982,
                339,
                3060,
            ],
        ),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        (
            "Once upon a time, there was a little robot who",
            [6403, 1980, 253, 655, 28, 665, 436, 253, 1838, 8085, 617],
        ),
    ],
)
def test_the_demo_models_tokenizer_gives_the_reference_ids(
    demo_tokenizer: Any, text: str, ids: list[int]
) -> None:
    assert demo_tokenizer(text)["input_ids"] == ids
    assert demo_tokenizer.decode(ids) == text


def test_the_demo_models_chat_template_gives_the_reference_ids(demo_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = demo_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ids == [
        *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018),
        *(411, 407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47),
        *(2, 198, 1, 520, 9531, 198),
    ]


def test_the_demo_models_special_tokens_are_known(demo: Checkpoint, demo_tokenizer: Any) -> None:
    # Beside its eos <|im_end|>: <|endoftext|>, and <reponame>, which llama.cpp counts as an end.
    ids = {"bos_token_id": 1, "eos_token_id": [2, 0, 4], "pad_token_id": 2}
    assert demo.generation_config == ids
    assert demo_tokenizer.eos_token == "<|im_end|>"
    assert demo_tokenizer.decode([1, 2], skip_special_tokens=True) == ""


def test_a_file_without_a_pre_tokenisers_name_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"lacks tokenizer\.ggml\.pre, .*'default' is used, which"):
        tokenizer = rebuilt(tmp_path, "gpt2", BYTES, token_merges=MERGES)
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("a 1234")
    assert [word for word, _ in cut] == ["a", "Ġ", "123", "4"]


def test_llama_3_is_known_without_a_name_by_its_first_special_token(tmp_path: Path) -> None:
    tokens = [*BYTES, *(f"<{i}>" for i in range(128000 - len(BYTES))), "<|begin_of_text|>"]
    with pytest.warns(UserWarning, match=r"'llama-bpe' is used\. Convert"):
        tokenizer = rebuilt(tmp_path, "gpt2", tokens, token_merges=MERGES, bos_token_id=128000)
    assert tokenizer.encode("12345").tokens == ["<|begin_of_text|>", *"12345"]


def test_a_sentencepiece_tokenizer_without_ids_has_those_of_its_kind(tmp_path: Path) -> None:
    tokens = [*SPM_SPECIAL, *SPM_BYTES, *SPM_PIECES]
    keys = {"token_types": [2, 3, 3, *[6] * 256, *[1] * len(SPM_PIECES)]}
    keys["token_scores"] = [0.0] * 259 + [-float(i) for i in range(len(SPM_PIECES))]
    without = files(tmp_path, "llama", tokens, **keys)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    assert without == files(tmp_path, "llama", tokens, **keys, **ids)
    assert json.loads(without["tokenizer_config.json"])["eos_token"] == "</s>"


def test_the_space_before_a_text_can_be_turned_off(tmp_path: Path) -> None:
    tokens = [*SPM_SPECIAL, *SPM_BYTES, *SPM_PIECES]
    keys = {"token_types": [2, 3, 3, *[6] * 256, *[1] * len(SPM_PIECES)]}
    keys["token_scores"] = [0.0] * 259 + [-float(i) for i in range(len(SPM_PIECES))]
    found = rebuilt(tmp_path, "llama", tokens, **keys, add_space_prefix=False)
    assert found.encode("the", add_special_tokens=False).tokens == ["t", "he"]
    assert found.decode(found.encode(" the").ids) == " the"


def test_an_end_token_of_another_type_is_a_special_token(tmp_path: Path) -> None:
    tokens = ["<|im_end|>", *BYTES]
    found = rebuilt(tmp_path, "gpt2", tokens, tokenizer_pre="gpt-2", token_merges=MERGES)
    assert found.encode("a<|im_end|>").ids == [tokens.index("a"), 0]
    assert found.decode([0]) == ""


def test_named_chat_templates_lie_beside_the_default_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(BYTES)
    writer.add_token_merges(MERGES)
    writer.add_chat_template(
        [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    )
    metadata = Metadata(path, read_gguf(finish(writer, path)).metadata, "llama")
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    assert config["chat_template"] == [
        {"name": "default", "template": "A"},
        {"name": "tool_use", "template": "B"},
    ]


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("gpt2", {"token_merges": ["ab"]}, r"merges has the entry 'ab', expected two tokens"),
        (
            "gpt2",
            {"token_list": ["a", "a"]},
            r"token of .*ggml\.tokens 'a' is there twice",
        ),
        ("gpt2", {"token_types": [1]}, r"token_type has 1 entries, at least 257 are needed"),
        ("llama", {"token_scores": [0.0]}, r"scores has 1 entries, at least 257 are needed"),
        ("llama", {}, r"lacks tokenizer\.ggml\.scores"),
        (
            "llama",
            {"token_list": ["x" * 2000], "token_scores": [0.0]},
            "has a piece of 2000 characters, at most 1024",
        ),
    ],
)
def test_a_damaged_tokenizer_is_named_with_its_file(
    tmp_path: Path, model: str, keys: dict[str, Any], message: str
) -> None:
    tokens = keys.pop("token_list", BYTES)
    keys = {"tokenizer_pre": "gpt-2", "token_merges": MERGES, **keys} if model == "gpt2" else keys
    with pytest.raises(ValueError, match=rf"tokenizer\.gguf.*{message}"):
        files(tmp_path, model, tokens, **keys)
