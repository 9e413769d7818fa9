"""``jaxengine complete``: prompts of the terminal, continued as it is generated."""

import sys
from collections.abc import Callable, Generator, Sequence

from jaxengine.cli.chat import print_pieces


def read_prompt(given: str | None) -> str | None:
    """Return the prompt of the command line or of a pipe; None if a terminal is to be asked.

    Raises:
        ValueError: If it is empty.
    """
    if given is None and sys.stdin.isatty():
        return None
    prompt = sys.stdin.read().removesuffix("\n") if given is None else given
    if not prompt:
        raise ValueError("no prompt was given: write it behind the flags, or into a pipe")
    return prompt


def complete(
    pieces_of: Callable[[str], Generator[str, None, None]],
    prompt: str | None,
    read: Callable[[str], str] = input,
) -> None:
    """Continue one prompt, or what the user types until Ctrl-D.

    Args:
        pieces_of: Yields the pieces of a continuation.
        prompt: None asks for prompts, line by line.
        read: Returns a line for a prompt; raises EOFError at Ctrl-D.

    Raises:
        ValueError: If the one prompt cannot be continued.
    """
    if prompt is not None:
        print_pieces(pieces_of(prompt), _write, _note)
        return
    _note("Every line is continued for itself; Ctrl-D leaves, Ctrl-C stops an output.")
    while True:
        try:
            line = read("> ")
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:  # Ctrl-C while typing drops the line
            _write("\n")
            continue
        if line:
            try:
                print_pieces(pieces_of(line), _write, _note)
            except ValueError as error:
                _note(f"error: {error}")


def has_url(arguments: Sequence[str]) -> bool:
    """Whether ``--url`` stands among the flags, so that no model is to be loaded."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return any(each.split("=", 1)[0] == "--url" for each in arguments[:end])


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
