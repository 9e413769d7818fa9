"""GrammarCompiler: compiles grammars in threads of their own, under a time limit, each once.

The compiler releases the interpreter while it works, so steps go on beside it. A thread cannot be
stopped, but the library's own limits (of grammar size, of work on regular expressions) end every
compilation: one that is late for its request is there for the next one that asks.
"""

import collections
import concurrent.futures
import threading
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits

from jaxengine.structured.grammar_state import CompiledGrammar
from jaxengine.structured.grammar_text import grammar_text
from jaxengine.structured.params import StructuredOutputsParams
from jaxengine.structured.token_vocabulary import TokenVocabulary

COMPILE_TIMEOUT_S = 10.0
CACHE_SIZE = 256  # grammars; a large one takes some megabytes
MAX_WORKERS = 2
Compiling = concurrent.futures.Future[CompiledGrammar]


class GrammarCompiler:
    """Compiles grammars for one model.

    Args:
        make_vocabulary: Returns the model's tokens; called once, with the first grammar.
        timeout_s: Longest wait for a grammar.
        cache_size: How many grammars are kept, the latest used ones.
    """

    def __init__(
        self,
        make_vocabulary: Callable[[], TokenVocabulary],
        *,
        timeout_s: float = COMPILE_TIMEOUT_S,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        self._make_vocabulary = make_vocabulary
        self._timeout_s = timeout_s
        self._cache_size = cache_size
        self._vocabulary: TokenVocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._compiling: collections.OrderedDict[str, Compiling] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(
            MAX_WORKERS, thread_name_prefix="grammar"
        )

    def submit(self, params: StructuredOutputsParams) -> Compiling:
        """Begin to compile; returns at once. The future raises ValueError for a bad grammar."""
        key = params.key
        with self._lock:
            if (known := self._compiling.get(key)) is not None:
                self._compiling.move_to_end(key)
                return known
            future = self._pool.submit(self._compile, params)
            self._compiling[key] = future
            while len(self._compiling) > self._cache_size:
                self._compiling.popitem(last=False)
        future.add_done_callback(lambda done: self._forget_failed(key, done))
        return future

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Return the compiled grammar.

        Raises:
            ValueError: If it is malformed, too large, asks for what the compiler does not know,
                or takes longer than the time limit.
        """
        try:
            return self.submit(params).result(self._timeout_s)
        except concurrent.futures.TimeoutError:
            raise ValueError(self.timeout_text(params)) from None

    def timeout_text(self, params: StructuredOutputsParams) -> str:
        """What to tell a user whose grammar takes too long."""
        return (
            f"the {params.kind} of structured_outputs took longer than {self._timeout_s:g} s to "
            "compile; simplify it (fewer properties, smaller repetitions), or try again later"
        )

    def _forget_failed(self, key: str, done: Compiling) -> None:
        """Errors are not kept: they are cheap to find again and may hold much text."""
        with self._lock:
            if done.exception() is not None and self._compiling.get(key) is done:
                del self._compiling[key]

    def _compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
        vocabulary = self._vocabulary
        text = grammar_text(params, vocabulary.special_ids)
        # Errors that show the parser's state help nobody outside.
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(vocabulary.ll_tokenizer, text, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask is the dearest, and may fail
        if matcher.is_error():
            raise ValueError(
                f"the {params.kind} of structured_outputs cannot be compiled: "
                f"{matcher.get_error():.500}"
            )
        return CompiledGrammar(matcher, vocabulary.num_words)
