"""Errors as OpenAI's clients know them: a status, and a body that says what was wrong."""

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jaxengine.engine_client import EngineDeadError

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: Of HTTP.
        kind: OpenAI's ``type``.
        param: The field to blame; None if there is none.
    """

    def __init__(
        self, message: str, status: int = 400, kind: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind or kind_of(status)
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }


class NotFoundError(ApiError):
    """There is no such model, or no such stored response."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, 404, param=param)


def kind_of(status: int) -> str:
    """Name a status as vLLM does."""
    names = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}
    if status in names:
        return names[status]
    return "InternalServerError" if status == 500 else f"{HTTPStatus(status).phrase} Error"


def as_api_error(error: Exception) -> ApiError:
    """Say an exception as a client may hear it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(str(error))
    if isinstance(error, EngineDeadError):
        return ApiError(str(error), 500)
    logger.exception("a request has failed", exc_info=error)
    return ApiError(f"the server has failed: {type(error).__name__}", 500)


def error_response(error: Exception) -> JSONResponse:
    """Answer with an error."""
    said = as_api_error(error)
    headers = {"Retry-After": "1"} if said.status == 503 else None
    return JSONResponse(said.body, said.status, headers)


def sse_error(error: Exception) -> bytes:
    """Write an error into a stream whose status has gone out."""
    return b"data: " + json.dumps(as_api_error(error).body).encode() + b"\n\n"


def install(app: FastAPI) -> None:
    """Let every exception become such an answer."""

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_of_validation(error))

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> JSONResponse:
        response = error_response(ApiError(str(error.detail), error.status_code))
        response.headers.update(error.headers or {})
        return response

    for kind in (ApiError, ValueError, EngineDeadError, Exception):

        @app.exception_handler(kind)
        async def fail(_: Request, error: Exception) -> JSONResponse:
            return error_response(error)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
    message = str(first.get("msg", "the request is not possible")).removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict) else f", got {given!r:.100}"
    return ApiError(f"{place + ': ' if place else ''}{message}{shown}", param=place or None)
