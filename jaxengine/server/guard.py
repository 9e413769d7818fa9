"""Guard: lets in who has a key and what is short and quick enough, before anything is parsed."""

import asyncio
import hashlib
import hmac
import os
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxengine.server.errors import ApiError, error_response
from jaxengine.server.state import ServerState

OPEN_PATHS = frozenset(("/health", "/ping", "/version"))
KEY_VARIABLE = "VLLM_API_KEY"


class ApiKeys:
    """The keys that open the server; all requests pass if there are none.

    Args:
        keys: As clients send them.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def of(cls, given: Iterable[str] | None) -> "ApiKeys":
        """Return the keys given as flags, or else that of the environment."""
        own = os.environ.get(KEY_VARIABLE)
        return cls(given if given is not None else [own] if own else [])

    def admit(self, headers: Headers) -> bool:
        """Whether a request has one of the keys. Takes the same time whichever it is."""
        if not self._digests:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(sent)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """The first to see a request: key, length and time of its body; counts what is worked on.

    Args:
        app: Who sees it next.
        state: The server's.
        open_files: Paths of the web page, which holds no secrets and asks for the key itself.
    """

    def __init__(self, app: ASGIApp, state: ServerState, open_files: Iterable[str] = ()) -> None:
        self._app = app
        self._state = state
        self._keys = ApiKeys.of(state.settings.api_key)
        self._open_files = frozenset(open_files)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            receive = await self._receive_body(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        self._state.num_requests += 1
        try:
            await self._app(scope, receive, self._with_request_id(scope, send))
        finally:
            self._state.num_requests -= 1

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        is_page = scope["method"] in ("GET", "HEAD") and path in self._open_files
        if path in OPEN_PATHS or is_page or self._keys.admit(Headers(scope=scope)):
            return
        raise ApiError("Unauthorized: send a key as 'Authorization: Bearer KEY'", 401)

    async def _receive_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body at once, and return what gives it to the app."""
        settings = self._state.settings
        limit = settings.max_request_body_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise _too_long(limit)
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                first = await _read(receive, limit)
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {settings.request_timeout_s:g} s", 408
            ) from None
        kind = Headers(scope=scope).get("content-type", "")
        if first.get("body") and "json" not in kind.lower():
            raise ApiError(f"Content-Type must be application/json, got {kind!r:.100}", 415)
        waiting = [first]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay

    def _with_request_id(self, scope: Scope, send: Send) -> Send:
        if not self._state.settings.enable_request_id_headers:
            return send
        name = Headers(scope=scope).get("x-request-id") or os.urandom(16).hex()

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("X-Request-Id", name)
            await send(message)

        return send_with_id


async def _read(receive: Receive, limit: int) -> Message:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_long(limit)
        if not message.get("more_body", False):
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def _too_long(limit: int) -> ApiError:
    return ApiError(
        f"the body is longer than {limit} bytes: send less, or raise --max-request-body-bytes", 413
    )
