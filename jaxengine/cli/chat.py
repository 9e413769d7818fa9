"""``jaxengine chat``: a conversation in the terminal, printed as it is generated."""

import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from jaxengine.compile_watch import CompileWatch
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.text.tokenizer import Tokenizer

with suppress(ImportError):
    import readline  # noqa: F401  # gives input() its history and line editing

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class Conversation:
    """Reads messages and prints answers; ``pieces`` says who answers.

    Args:
        system_prompt: First message, kept by ``reset``; None for none.
        write: Prints text without a line break.
        note: Prints a line that is no part of the conversation.

    Attributes:
        messages: What was said so far.
    """

    def __init__(
        self,
        system_prompt: str | None = None,
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._note = note
        self._system_prompt = system_prompt
        self._write = write
        self.messages: list[dict[str, str]] = []
        self.reset()

    def pieces(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """Yield the pieces of an answer as they come.

        Raises:
            ValueError: If there can be none.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = []
        if self._system_prompt:
            self.messages.append({"role": "system", "content": self._system_prompt})

    def run(self, read: Callable[[str], str] = input) -> None:
        """Talk until the user leaves.

        Args:
            read: Returns a line for a prompt; raises EOFError at Ctrl-D.
        """
        self._write(f"{HELP}\n")
        while True:
            try:
                line = read("> ").strip()
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:  # Ctrl-C while typing drops the line
                self._write("\n")
                continue
            if line == "/exit":
                return
            if line == "/reset":
                self.reset()
                self._write("The conversation is forgotten.\n")
            elif line.startswith("/"):
                self._write(f"{HELP}\n")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Answer one message; on an error the conversation stays as it was."""
        try:
            self.say(line)
        except ValueError as error:
            self._write(f"error: {error}\n")

    def say(self, line: str) -> None:
        """Answer one message.

        Raises:
            ValueError: If that is not possible; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": line}]
        answer = print_pieces(self.pieces(messages), self._write, self._note)
        self.messages = [*messages, {"role": "assistant", "content": answer}]


class Chat(Conversation):
    """A conversation with a model of this process.

    Args:
        llm: The model.
        params: Sampling parameters of every answer.
        options: Of ``Conversation``.
    """

    def __init__(
        self, llm: Any, params: SamplingParams, system_prompt: str | None = None, **options: Any
    ) -> None:
        super().__init__(system_prompt, **options)
        self._llm = llm
        self._tokenizer = Tokenizer(llm.get_tokenizer())
        self._params = params

    def pieces(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """Yield the pieces of an answer as they come."""
        token_ids = self._tokenizer.encode_chat(messages)
        return stream_text(self._llm, {"prompt_token_ids": token_ids}, self._params)


def stream_text(llm: Any, prompt: Any, params: SamplingParams) -> Generator[str, None, None]:
    """Yield the pieces of one output as they come; closing the iterator aborts it."""
    params = params.clone(n=1, output_kind=RequestOutputKind.DELTA)
    with closing(llm.stream(prompt, params)) as outputs:
        for output in outputs:
            for completion in output.outputs:
                yield completion.text


def print_pieces(
    pieces: Generator[str, None, None], write: Callable[[str], None], note: Callable[[str], None]
) -> str:
    """Print pieces of text until they end, or Ctrl-C ends them, and then a line break.

    Args:
        pieces: Of one answer.
        write: Prints text without a line break.
        note: Prints a line that is no part of it.

    Returns:
        What was printed.
    """
    parts: list[str] = []
    notes: list[str] = []

    def say_compiling() -> None:
        if not notes and not parts:
            notes.append("(compiling for a moment, later answers begin at once)")
            note(notes[0])

    with CompileWatch(say_compiling), stop_on_interrupt() as is_interrupted, closing(pieces):
        for piece in pieces:
            parts.append(piece)
            write(piece)
            if is_interrupted():
                break
    write("\n")
    return "".join(parts)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into an answer of True; the second interrupts as usual.

    An interrupt in the middle of an engine step would leave the engine half updated.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted.is_set  # signals go to the main thread
        return
    previous = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: Any) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
