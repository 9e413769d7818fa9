"""EventReader: the data of server-sent events, out of bytes as they come from a socket."""

import json
from typing import Any


class RemoteError(ValueError):
    """A server could not be reached, or has answered with an error; says which and why."""


class EventReader:
    """Joins pieces of a stream and takes the events out of it.

    Attributes:
        is_done: Whether the stream has said that it is complete.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.is_done = False

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """Return what the events that are complete now hold.

        Only a line feed ends a line: a text in JSON may hold any other character that counts as
        the end of a line elsewhere.

        Raises:
            RemoteError: If one is an error, or is not JSON.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.is_done = True
                elif data:
                    found.append(_read(data))
        return found


def _read(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        raise RemoteError(f"the server has sent an event that is not JSON: {data!r:.200}") from None
    if not isinstance(values, dict):
        raise RemoteError(f"the server has sent an event that is no object: {data!r:.200}")
    if values.get("error"):
        raise RemoteError(f"the server says: {error_message(data)}")
    return values


def error_message(body: bytes) -> str:
    """Return what an error's body says: OpenAI's message, FastAPI's detail, or the text itself."""
    text = body.decode(errors="replace").strip()
    try:
        values = json.loads(text)
    except ValueError:
        return text[:500] or "nothing"
    if isinstance(values, dict):
        error = values.get("error", values)
        if isinstance(error, dict):
            return str(error.get("message") or error.get("detail") or text[:500])
        return str(error)
    return text[:500]
