"""Compiling beside the engine: under a time limit, each grammar once, errors to everybody."""

import threading
import time
from typing import Any

import pytest

from jaxengine.structured.compiler import GrammarCompiler
from jaxengine.structured.params import StructuredOutputsParams
from jaxengine.structured.token_vocabulary import TokenVocabulary, build_token_vocabulary
from tests.structured.helpers import EOS, VOCAB_SIZE, allowed_ids, tokenizer


def vocabulary() -> TokenVocabulary:
    return build_token_vocabulary(tokenizer(), VOCAB_SIZE, [EOS])


def regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


def test_a_grammar_that_takes_too_long_is_refused_and_there_for_the_next_who_asks() -> None:
    goes_on = threading.Event()

    def slow_vocabulary() -> TokenVocabulary:
        assert goes_on.wait(60)
        return vocabulary()

    compiler = GrammarCompiler(slow_vocabulary, timeout_s=0.01)
    with pytest.raises(ValueError, match=r"regex .* took longer than 0\.01 s to compile; simplify"):
        compiler.compile(regex("a"))
    waiting = compiler.submit(regex("a"))
    goes_on.set()
    assert allowed_ids(waiting.result(60).new_state())
    assert compiler.submit(regex("a")) is waiting


def test_compiling_does_not_keep_other_threads_from_running() -> None:
    """The library releases the interpreter: this thread goes on beside a large schema."""
    properties = {f"key {n}": {"type": "string"} for n in range(2000)}
    compiler = GrammarCompiler(vocabulary, timeout_s=120)
    compiling = compiler.submit(StructuredOutputsParams(json={"properties": properties}))
    num_turns = 0
    while not compiling.done():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 10
    assert allowed_ids(compiling.result().new_state())


def test_the_least_recently_used_grammar_goes_first() -> None:
    compiler = GrammarCompiler(vocabulary, cache_size=2)
    a, b = compiler.compile(regex("a")), compiler.compile(regex("b"))
    assert compiler.compile(regex("a")) is a
    compiler.compile(regex("c"))
    assert compiler.compile(regex("a")) is a
    assert compiler.compile(regex("b")) is not b


def test_a_vocabulary_that_cannot_be_made_is_an_error_of_each_request_not_of_the_compiler() -> None:
    answers: list[Any] = [ValueError("not now"), vocabulary()]

    def make() -> TokenVocabulary:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    compiler = GrammarCompiler(make)
    with pytest.raises(ValueError, match="not now"):
        compiler.compile(regex("a"))
    assert allowed_ids(compiler.compile(regex("a")).new_state())


def test_many_threads_asking_for_one_grammar_compile_it_once() -> None:
    compiler = GrammarCompiler(vocabulary)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(compiler.compile(regex("[a-z]+"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
