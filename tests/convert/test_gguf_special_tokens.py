"""Which tokens begin and end a text, by the keys of a GGUF file and by its kind of vocabulary."""

from pathlib import Path
from typing import Any

import pytest
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.gguf_special_tokens import control_ids, end_ids, generation_config

LETTERS = [f"t{number}" for number in range(20)]


def metadata(kind: str, tokens: list[str], **keys: Any) -> Metadata:
    values = {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens}
    return Metadata(
        Path("m.gguf"), {**values, **{f"tokenizer.ggml.{key}": each for key, each in keys.items()}}
    )


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("llama", {}, {"bos_token_id": 1, "eos_token_id": 2}),
        ("gpt2", {}, {"bos_token_id": 11, "eos_token_id": 11}),
        ("gpt2", {"pre": "chatglm-bpe"}, {"eos_token_id": 11}),
        ("t5", {}, {"eos_token_id": 1, "pad_token_id": 0}),
        ("llama", {"bos_token_id": 5}, {"bos_token_id": 5, "eos_token_id": 2}),
        (
            "llama",
            {"padding_token_id": 7},
            {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 7},
        ),
        # An id outside the vocabulary counts as none, so the default holds.
        ("llama", {"eos_token_id": 2**32 - 1}, {"bos_token_id": 1, "eos_token_id": 2}),
        ("none", {}, {}),
    ],
)
def test_ids_that_a_file_leaves_out_follow_from_its_kind_of_vocabulary(
    kind: str, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert generation_config(metadata(kind, LETTERS, **keys)) == expected


def test_defaults_outside_the_vocabulary_are_none() -> None:
    assert generation_config(metadata("gpt2", LETTERS[:5])) == {}
    assert generation_config(metadata("bert", LETTERS)) == {"pad_token_id": 0}


def test_eot_and_eom_end_a_generation_too() -> None:
    found = metadata("llama", LETTERS, eos_token_id=2, eot_token_id=9, eom_token_id=4)
    assert end_ids(found) == [2, 9, 4]


@pytest.mark.parametrize(
    "text",
    [
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "<|return|>", "<|call|>"),
        *("<end_of_utterance>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    ],
)
def test_tokens_of_well_known_names_end_a_generation(text: str) -> None:
    tokens = [*LETTERS, text]
    found = metadata("llama", tokens, eos_token_id=2)
    assert end_ids(found) == [2, 20]
    assert control_ids(found) == {20}


def test_other_control_tokens_end_nothing() -> None:
    tokens = [*LETTERS, "<|im_start|>", "<|user|>", "<|start_header_id|>"]
    assert end_ids(metadata("llama", tokens, eos_token_id=2)) == [2]


def test_the_end_of_a_message_that_others_follow_ends_nothing() -> None:
    tokens = [*LETTERS, "<|end|>", "<|return|>", "<|call|>"]
    assert end_ids(metadata("llama", tokens, eos_token_id=2)) == [2, 21, 22]
    tokens = [*LETTERS, "</s>", "<|tool_response>"]
    assert end_ids(metadata("llama", tokens, eos_token_id=2)) == [2, 21]


def test_an_id_that_is_no_integer_is_named() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.eos_token_id is 2\.0, possible is an"):
        end_ids(metadata("llama", LETTERS, eos_token_id=2.0))
