"""The app: all routes over one AsyncLLM. Whoever has an event loop can serve it."""

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

import jaxengine
from jaxengine.server import errors
from jaxengine.server.guard import Guard
from jaxengine.server.parsers.output_parser import check_parsers
from jaxengine.server.routes import chat, completions, messages, responses, service, tokens
from jaxengine.server.state import ServerState
from jaxengine.server.streaming import ClientGoneError

HERE = Path(__file__).parent
STATIC = HERE / "static"
DOCS_PAGE = HERE / "docs.html"
# One an endpoint family. Pooling endpoints join here when models can pool.
ROUTERS = (
    *(service.router, completions.router, chat.router),
    *(responses.router, messages.router, tokens.router),
)


def create_app(state: ServerState) -> FastAPI:
    """Return the app.

    Raises:
        ValueError: If a flag names a parser that is not there.
    """
    settings = state.settings
    check_parsers(settings.tool_call_parser, state.reasoning_parser)
    app = FastAPI(
        title="jaxengine",
        version=jaxengine.__version__,
        description="Inference of language models, in the form of OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None if settings.disable_fastapi_docs else "/openapi.json",
        root_path=settings.root_path,
    )
    app.state.server = state
    errors.install(app)
    app.add_exception_handler(ClientGoneError, _nobody)
    for router in ROUTERS:
        app.include_router(router)
    if settings.server_dev_mode:
        app.include_router(service.dev_router)
    if not settings.disable_fastapi_docs:
        _serve_docs(app)
    if (STATIC / "index.html").is_file():
        app.mount("/", PageFiles(directory=STATIC, html=True), name="page")
    app.add_middleware(Guard, state=state, open_files=_page_paths())
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.allowed_origins),
        allow_credentials=settings.allow_credentials,
        allow_methods=list(settings.allowed_methods),
        allow_headers=list(settings.allowed_headers),
    )
    return app


class PageFiles(StaticFiles):
    """The page. What asks for no file of it, as POST to a path that is not there, finds nothing."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer GET and HEAD."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        return await super().get_response(path, scope)


def _page_paths() -> list[str]:
    if not STATIC.is_dir():
        return []
    files = [path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()]
    return ["/", *(f"/{file}" for file in files)]


def _serve_docs(app: FastAPI) -> None:
    page = DOCS_PAGE.read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client is gone; nobody reads this
