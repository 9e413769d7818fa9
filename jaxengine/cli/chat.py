"""``jaxengine chat``: a conversation in the terminal, printed as it is generated."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from jaxengine.compile_watch import CompileWatch
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.text.tokenizer import Tokenizer

with suppress(ImportError):
    import readline  # noqa: F401  # gives input() its history and line editing

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class Chat:
    """A conversation with a model.

    Args:
        llm: The model.
        params: Sampling parameters of every answer.
        system_prompt: First message, kept by ``reset``; None for none.
        write: Prints text without a line break.
        note: Prints a line that is no part of the conversation.
    """

    def __init__(
        self,
        llm: Any,
        params: SamplingParams,
        system_prompt: str | None = None,
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._note = note
        self._llm = llm
        self._tokenizer = Tokenizer(llm.get_tokenizer())
        self._params = params.clone(n=1, output_kind=RequestOutputKind.DELTA)
        self._system_prompt = system_prompt
        self._write = write
        self.messages: list[dict[str, str]] = []
        self.reset()

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
        messages = [*self.messages, {"role": "user", "content": line}]
        try:
            token_ids = self._tokenizer.encode_chat(messages)
            answer = self._print_answer(token_ids)
        except ValueError as error:
            self._write(f"error: {error}\n")
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _print_answer(self, token_ids: list[int]) -> str:
        parts: list[str] = []
        notes: list[str] = []

        def say_compiling() -> None:
            if not notes and not parts:
                notes.append("(compiling for a moment, later answers begin at once)")
                self._note(notes[0])

        with (
            CompileWatch(say_compiling),
            stop_on_interrupt() as is_interrupted,
            closing(self._llm.stream({"prompt_token_ids": token_ids}, self._params)) as outputs,
        ):
            for output in outputs:
                for completion in output.outputs:
                    parts.append(completion.text)
                    self._write(completion.text)
                if is_interrupted():
                    break
        self._write("\n")
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
