"""Tokenizers built here and, where it has been fetched, SmolLM2's."""

import functools
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from jaxengine.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, hello world!  Two  spaces\n\tand tabs.",
    "你好,世界。機械学習は楽しい。안녕하세요 세계",
    "Emoji: 😀😃👨‍👩‍👧‍👦🇩🇪 naïve café Übergröße",
] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


@functools.cache
def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("user defined", special=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    hf.chat_template = CHATML
    return Tokenizer(hf, {"eos_token_id": [7]})


@functools.cache
def sentencepiece() -> Tokenizer:
    """Llama 2's arrangement: visible spaces, bytes for unknown characters, a leading space."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.,!", "▁t", "he", "▁the", "lo", "ll"]
    vocabulary |= {piece: 3 + index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "o"), ("l", "l")]
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


@functools.cache
def word_piece() -> Tokenizer:
    words = ["[UNK]", "hello", "wor", "##ld", "##s", ",", "good", "##bye"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def stream(tokenizer, token_ids, prompt=(), chunk=1, **options):
    """Concatenated deltas, ``chunk`` tokens at a time."""
    detokenizer = tokenizer.detokenizer(list(prompt), **options)
    parts = [detokenizer.append(token_ids[i : i + chunk]) for i in range(0, len(token_ids), chunk)]
    return "".join(parts) + detokenizer.flush()


@settings(max_examples=150, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, 325), max_size=30),
    chunk=st.integers(1, 4),
    skip=st.booleans(),
)
def test_byte_level_deltas_join_to_the_decoded_text_for_any_tokens(token_ids, chunk, skip) -> None:
    tokenizer = byte_level()
    expected = tokenizer.decode(token_ids, skip_special_tokens=skip)
    joined = stream(tokenizer, token_ids, chunk=chunk, skip_special_tokens=skip)
    assert expected.startswith(joined)
    assert expected[len(joined) :] in ("", "\ufffd")  # of a character that was cut off


TEXTS = st.text(st.sampled_from("hello the, 你好😀é\n\t👨‍👩‍👧ü. "), max_size=30)


@settings(max_examples=80, deadline=None)
@given(text=TEXTS, prompt=TEXTS, chunk=st.integers(1, 3))
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_deltas_continue_the_text_of_the_prompt(make, text, prompt, chunk) -> None:
    tokenizer = make()
    token_ids, prompt_ids = tokenizer.encode(text), tokenizer.encode(prompt)
    expected = tokenizer.decode(prompt_ids + token_ids)
    deltas = stream(tokenizer, token_ids, prompt=prompt_ids, chunk=chunk)
    assert tokenizer.decode(prompt_ids) + deltas == expected


def test_a_character_split_over_tokens_appears_once_when_it_is_whole() -> None:
    tokenizer = byte_level()
    token_ids = [tokenizer.hf_tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]  # 😀
    detokenizer = tokenizer.detokenizer([])
    assert [detokenizer.append([i]) for i in token_ids] == ["", "", "", "😀"]


@pytest.mark.parametrize("make", ["byte_level", "sentencepiece"])
def test_a_character_that_is_cut_off_at_the_end_is_no_text(make) -> None:
    tokenizer = byte_level() if make == "byte_level" else sentencepiece()
    token_ids = tokenizer.encode("😀")[-4:]
    detokenizer = tokenizer.detokenizer([])
    assert "".join(detokenizer.append([i]) for i in token_ids[:-1]) == ""
    assert detokenizer.flush() == ""
    detokenizer = tokenizer.detokenizer([])
    assert detokenizer.append(token_ids) + detokenizer.flush() == "😀"


def test_the_token_that_completes_a_character_has_its_text_and_those_before_have_none() -> None:
    tokenizer = byte_level()
    token_ids = [tokenizer.hf_tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]  # 😀
    texts = [tokenizer.token_text(token_ids[i], token_ids[:i]) for i in range(4)]
    assert texts == ["", "", "", "😀"]
    assert tokenizer.token_text(token_ids[1]) == "\ufffd"  # begins nothing


def test_a_leading_space_is_kept_behind_a_prompt_and_dropped_at_the_start() -> None:
    tokenizer = sentencepiece()
    token_ids = tokenizer.encode("the", add_special_tokens=False)
    assert stream(tokenizer, token_ids, prompt=tokenizer.encode("abc")) == " the"
    bos = tokenizer.hf_tokenizer.bos_token_id
    assert stream(tokenizer, token_ids, prompt=[bos]) == "the"


@settings(max_examples=40, deadline=None)
@given(token_ids=st.lists(st.integers(1, 7), min_size=1, max_size=20))
def test_decoders_that_look_at_neighbours_are_decoded_in_a_window(token_ids) -> None:
    tokenizer = word_piece()
    first = tokenizer.decode(token_ids[:1])
    deltas = stream(tokenizer, token_ids[1:], prompt=token_ids[:1])
    assert first + deltas == tokenizer.decode(token_ids)


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    assert stream(byte_level(), [10**6]) == ""


def test_special_tokens_are_skipped_only_if_asked() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("<|im_start|>Hello<|im_end|>")
    assert stream(tokenizer, token_ids) == "Hello"
    shown = stream(tokenizer, token_ids, skip_special_tokens=False)
    assert shown == "<|im_start|>Hello<|im_end|>"
    assert tokenizer.token_text(token_ids[0]) == "<|im_start|>"


def test_the_chat_template_is_rendered_and_its_special_tokens_are_one_token_each() -> None:
    tokenizer = byte_level()
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    start = tokenizer.hf_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.encode_chat(messages).count(start) == 2


def test_the_last_message_can_be_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    text = byte_level().render_chat(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("assistant\nI am")


def test_tools_and_another_template_reach_the_template() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert "tools: 1" in byte_level().render_chat(messages, tools=[tool])
    assert byte_level().render_chat(messages, chat_template="{{ x }}!", x=5) == "5!"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"continue_final_message": True}, "exclude each other"),
        ({"chat_template": "{{ raise_exception('no system role') }}"}, "no system role"),
        ({"chat_template": "{% if %}"}, "refused"),
    ],
)
def test_a_chat_that_cannot_be_written_is_a_value_error(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        byte_level().render_chat([{"role": "user", "content": "Hi"}], **options)


def test_a_tokenizer_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="chat_template="):
        sentencepiece().render_chat([{"role": "user", "content": "Hi"}])


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer() -> None:
    tokenizer = byte_level()
    assert tokenizer.eos_token_ids == {7, tokenizer.hf_tokenizer.eos_token_id}
    assert sentencepiece().eos_token_ids == frozenset()


def word_tokenizer(*pieces: str) -> Tokenizer:
    """Byte-level BPE whose vocabulary holds single characters and these pieces, merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, vocab = [], {c: i for i, c in enumerate(alphabet)}
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocab:
                merges.append((piece[: end - 1], piece[end - 1]))
                vocab[piece[:end]] = len(vocab)
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    ("pieces", "banned"),
    [
        (["Ġdog", "dog"], [["dog"], ["Ġdog"]]),  # the space is part of one token
        (["dog"], [["dog"]]),  # the space is a token of its own
        (["Ġdog", "do"], [["do", "g"]]),  # behind the space the word is cut into fewer tokens
        (["Ġdo", "do"], [["do", "g"], ["Ġdo", "g"]]),
    ],
)
def test_bad_words_behind_a_space_are_banned_where_the_space_joins_their_first_token(
    pieces, banned
) -> None:
    tokenizer = word_tokenizer(*pieces)
    for word in ("dog", " dog"):
        sequences = tokenizer.bad_words_token_ids([word])
        assert [tokenizer.hf_tokenizer.convert_ids_to_tokens(s) for s in sequences] == banned


def test_a_tokenizer_loads_from_a_directory(tmp_path) -> None:
    byte_level().hf_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "Hello, 世界 😀"
    assert loaded.encode(text) == byte_level().encode(text)
    assert loaded.encode_batch([text, ""]) == [byte_level().encode(text), []]
    assert loaded.has_chat_template


def test_remote_code_is_refused_with_the_reason(tmp_path) -> None:
    with pytest.raises(ValueError, match="would run Python code"):
        load_tokenizer(tmp_path, trust_remote_code=True)


def test_a_directory_without_a_tokenizer_is_an_error_with_a_remedy(tmp_path) -> None:
    with pytest.raises(ValueError, match="Pass tokenizer="):
        load_tokenizer(tmp_path)


def demo_model() -> Path | None:
    configured = os.environ.get("JAXENGINE_DEMO_MODEL")
    root = Path(__file__).parents[2] / ".models"
    found = [Path(configured)] if configured else sorted(root.glob("**/*.gguf"))
    return next((path for path in found if path.exists()), None)


@pytest.mark.skipif(demo_model() is None, reason="the demo model is not there")
def test_smollm2_deltas_join_to_the_decoded_text(tmp_path) -> None:
    from jaxengine.convert import open_checkpoint

    open_checkpoint(demo_model()).write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rng = random.Random(0)
    samples = [tokenizer.encode(text) for text in CORPUS]
    samples += [rng.choices(range(tokenizer.num_tokens), k=50) for _ in range(50)]
    for token_ids in samples:
        for skip in (True, False):
            deltas = stream(tokenizer, token_ids, skip_special_tokens=skip)
            assert deltas == tokenizer.decode(token_ids, skip_special_tokens=skip)
