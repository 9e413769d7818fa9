"""Names of requests: the client's own, or new ones."""

import re
import secrets

from fastapi import Request

_SAFE = re.compile(r"[\w.:\-]{1,256}")


def new_request_id(prefix: str, given: str | None, request: Request) -> str:
    """Return the name of an answer, such as "cmpl-1f...".

    Args:
        prefix: What the endpoint's names begin with.
        given: The field ``request_id``.
        request: Its header X-Request-Id counts otherwise.
    """
    own = given or request.headers.get("x-request-id")
    if own is not None and not _SAFE.fullmatch(own):
        own = None
    return f"{prefix}-{own or secrets.token_hex(16)}"
