"""A client of an ASGI app without sockets: requests, streams, and clients that go away."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

from jaxengine.server.state import ServerState

LIMIT_S = 30


@dataclass
class Answer:
    """What an app has sent.

    Attributes:
        status: Of HTTP; 0 if nothing was sent.
        headers: By their names in small letters.
        pieces: The body as it was sent.
        is_whole: Whether the app has said that the body ends.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.pieces)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, whose form is checked."""
        values = self.json()
        assert set(values) == {"error"}
        assert set(values["error"]) == {"message", "type", "param", "code"}
        assert values["error"]["code"] == self.status
        return dict(values["error"])

    @property
    def data(self) -> list[str]:
        """The data of each event, in a stream."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        lines = [line for block in blocks for line in block.split("\n")]
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The events of a stream that ends with [DONE]."""
        *data, last = self.data
        assert last == "[DONE]"
        return [json.loads(each) for each in data]

    @property
    def named_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and values of a stream whose events have names."""
        names = [
            line.removeprefix("event: ")
            for line in self.body.decode().split("\n")
            if line.startswith("event: ")
        ]
        return list(zip(names, map(json.loads, self.data), strict=True))


class AsgiClient:
    """Sends requests to an app.

    Args:
        app: Whom to ask.
        state: The app's.
        runner: Its event loop.
    """

    def __init__(self, app: ASGIApp, state: ServerState, runner: asyncio.Runner) -> None:
        self.app = app
        self.state = state
        self.runner = runner

    def get(self, path: str, **options: Any) -> Answer:
        """Ask with GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, values: Any = None, **options: Any) -> Answer:
        """Ask with POST and a body of JSON."""
        return self.request("POST", path, values=values, **options)

    def request(self, method: str, path: str, **options: Any) -> Answer:
        """Ask, and wait for the whole answer; as ``send``."""
        return self.runner.run(asyncio.wait_for(self.send(method, path, **options), LIMIT_S))

    async def send(
        self,
        method: str,
        path: str,
        *,
        values: Any = None,
        parts: list[bytes] | None = None,
        headers: dict[str, str] | None = None,
        leave_after: int | None = None,
        leave: asyncio.Event | None = None,
    ) -> Answer:
        """Ask on the event loop.

        Args:
            method: GET, POST, ...
            path: Without a query.
            values: The body, sent as JSON.
            parts: The body in pieces, instead.
            headers: Besides Content-Type.
            leave_after: Go away after so many pieces of the answer.
            leave: Go away when this is set.
        """
        has_json = values is not None
        sent = list(parts) if parts is not None else [json.dumps(values).encode()] * has_json
        given = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        answer, gone = Answer(), leave or asyncio.Event()
        waiting = sent or [b""]

        async def receive() -> Message:
            if waiting:
                body = waiting.pop(0)
                return {"type": "http.request", "body": body, "more_body": bool(waiting)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def take(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
                return
            answer.pieces.append(message.get("body", b""))
            answer.is_whole = not message.get("more_body", False)
            if leave_after is not None and len(answer.pieces) >= leave_after:
                gone.set()

        await self.app(scope, receive, take)
        return answer
