"""``jaxengine chat --url`` and ``complete --url``: talk to any server of OpenAI's kind."""

import argparse
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from jaxengine.cli.arguments import REPEATED_FIELDS, Parser, human_int, hyphenate
from jaxengine.cli.chat import Conversation
from jaxengine.cli.complete import complete, read_prompt
from jaxengine.cli.server_sent_events import EventReader, RemoteError, error_message

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT = httpx2.Timeout(10.0, read=None)  # seconds to connect; a first token takes its time
SAMPLING: dict[str, Callable[[str], Any]] = {
    **{"max_tokens": human_int, "temperature": float, "top_p": float, "top_k": int},
    **{"min_p": float, "presence_penalty": float, "frequency_penalty": float},
    **{"repetition_penalty": float, "seed": int, "stop": str},
}


class RemoteModel:
    """One model of a server.

    Args:
        url: Up to "/v1"; of a server's bare address that is added.
        model_name: None takes the first one that the server lists.
        api_key: None reads the environment variable OPENAI_API_KEY, and sends none without it.
        params: Fields of every request.
        transport: None is the network.

    Raises:
        RemoteError: If the server does not answer, or lists no model.
    """

    def __init__(
        self,
        url: str,
        model_name: str | None = None,
        api_key: str | None = None,
        params: Mapping[str, Any] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._url = base_url(url)
        self._client = httpx2.Client(
            headers=key_headers(api_key), timeout=TIMEOUT, transport=transport
        )
        self._params = dict(params or {})
        self.name = model_name or self._first_model()

    def complete(self, prompt: str) -> Generator[str, None, None]:
        """Yield the pieces of a prompt's continuation as they come.

        Raises:
            RemoteError: If the server says so, or the stream breaks off.
        """
        for choice in self._choices("completions", {"prompt": prompt}):
            yield choice.get("text") or ""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Generator[str, None, None]:
        """Yield the pieces of an answer as they come.

        Raises:
            RemoteError: If the server says so, or the stream breaks off.
        """
        for choice in self._choices("chat/completions", {"messages": list(messages)}):
            yield (choice.get("delta") or {}).get("content") or ""

    def _choices(self, path: str, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        body = {"model": self.name, **fields, **self._params, "stream": True}
        url, events = f"{self._url}/{path}", EventReader()
        with said_by(url), self._client.stream("POST", url, json=body) as reply:
            if reply.status_code != 200:
                raise RemoteError(refusal(url, reply.status_code, reply.read()))
            for piece in reply.iter_bytes():
                for values in events.feed(piece):
                    yield from values.get("choices") or ()
        if not events.is_done:
            raise RemoteError(f"{url}: the stream broke off before its end")

    def _first_model(self) -> str:
        url = f"{self._url}/models"
        with said_by(url):
            reply = self._client.get(url)
        if reply.status_code != 200:
            raise RemoteError(refusal(url, reply.status_code, reply.content))
        try:
            return str(reply.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise RemoteError(f"{url} lists no model: name one with --model-name") from None


def base_url(url: str) -> str:
    """Return the URL that paths such as "/completions" are added to.

    Raises:
        ValueError: If it is none.
    """
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"--url {url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"--url {url!r} must be http://HOST:PORT or https://HOST/v1")
    return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")


def key_headers(api_key: str | None) -> dict[str, str]:
    """Return the header that bears the key, or else that of the environment."""
    key = api_key or os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def refusal(url: str, status: int, body: bytes) -> str:
    """Say what a server has answered instead of what it was asked for."""
    remedy = ": give --api-key" if status == 401 else ""
    return f"{url} answered {status}: {error_message(body)}{remedy}"


@contextmanager
def said_by(url: str) -> Iterator[None]:
    """Turn the errors of the network into ``RemoteError``, which names the URL."""
    try:
        yield
    except httpx2.HTTPError as error:
        raise RemoteError(f"{url}: {str(error) or type(error).__name__}") from None


class RemoteChat(Conversation):
    """A conversation with a server's model.

    Args:
        model: Answers.
        options: Of ``Conversation``.
    """

    def __init__(self, model: RemoteModel, **options: Any) -> None:
        super().__init__(**options)
        self._model = model

    def pieces(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """Yield the pieces of an answer as they come."""
        return self._model.chat(messages)


def remote_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of ``chat --url`` or ``complete --url``."""
    parser = Parser(
        prog=f"jaxengine {command}",
        description="Talk to a server of OpenAI's kind.",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks (default: False)")
    parser.add_argument("--url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument("--model-name", metavar="NAME", help="default: the first that is listed")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"default: the environment's {KEY_VARIABLE}"
    )
    if command == "chat":
        parser.add_argument("--system-prompt", help="first message (default: none)")
        parser.add_argument("-q", "--quick", metavar="TEXT", help="one message, then end")
    else:
        parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="none: standard input")
        parser.add_argument("-q", "--quick", metavar="PROMPT", help="the same, as a flag")
    group = parser.add_argument_group("sampling", "Defaults are the server's.")
    for name, kind in SAMPLING.items():
        flag, metavar = "--" + name.replace("_", "-"), "TEXT" if kind is str else "X"
        options: dict[str, Any] = {"action": "append"} if name in REPEATED_FIELDS else {}
        group.add_argument(flag, type=kind, metavar=metavar, **options)
    return parser


def remote_main(command: str, arguments: Sequence[str]) -> int:
    """Run ``chat`` or ``complete`` with ``--url``; return the exit status."""
    options = remote_parser(command).parse_args(hyphenate(arguments))
    given = {name: getattr(options, name) for name in SAMPLING}
    params = {name: value for name, value in given.items() if value is not None}
    model = RemoteModel(options.url, options.model_name, options.api_key, params)
    if command == "complete":
        complete(model.complete, read_prompt(options.prompt or options.quick))
        return 0
    chat = RemoteChat(model, system_prompt=options.system_prompt)
    if options.quick is None:
        print(f"{model.name} at {options.url}", file=sys.stderr)
        chat.run()
    else:
        chat.say(options.quick)
    return 0
