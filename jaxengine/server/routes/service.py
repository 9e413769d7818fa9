"""What says how the server is, and what tends its engine."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import jaxengine
from jaxengine.server.errors import ApiError, NotFoundError
from jaxengine.server.health import check_health
from jaxengine.server.protocol.common import ErrorResponse
from jaxengine.server.protocol.models import Load, ModelCard, ModelList, Version
from jaxengine.server.state import ServerState, state_of

router = APIRouter(tags=["service"])
dev_router = APIRouter(tags=["development"])
UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": ErrorResponse}}
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}}


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """List the names that requests may give."""
    return ModelList(data=_cards(state_of(request)))


@router.get("/v1/models/{name:path}", responses=UNKNOWN)
async def show_model(name: str, request: Request) -> ModelCard:
    """Describe one model."""
    for card in _cards(state_of(request)):
        if card.id == name:
            return card
    raise NotFoundError(f"The model `{name}` does not exist.", param="model")


@router.get("/health", responses=UNHEALTHY, response_model=None)
async def health(request: Request) -> Response:
    """Answer 200 with nothing while the engine makes progress."""
    if (problem := check_health(state_of(request))) is not None:
        raise ApiError(problem, 503)
    return Response(status_code=200)


@router.get("/ping", responses=UNHEALTHY, response_model=None)
async def ping(request: Request) -> Response:
    """Answer as /health does."""
    return await health(request)


@router.post("/ping", responses=UNHEALTHY, response_model=None)
async def ping_by_post(request: Request) -> Response:
    """Answer as /health does."""
    return await health(request)


@router.get("/version")
async def version() -> Version:
    """Say the package's version."""
    return Version(version=jaxengine.__version__)


@router.get("/load")
async def load(request: Request) -> Load:
    """Say how many requests are worked on."""
    return Load(server_load=state_of(request).num_requests)


@router.get(
    "/metrics",
    response_model=None,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Give everything that is counted, in the format of Prometheus."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


@dev_router.post("/reset_prefix_cache", response_model=None)
async def reset_prefix_cache(request: Request) -> Response:
    """Forget all cached prefixes, if no request runs."""
    is_done = await state_of(request).llm.reset_prefix_cache()
    if not is_done:
        raise ApiError("requests still run: their blocks are in use", 409)
    return Response(status_code=200)


@dev_router.post("/start_profile", response_model=None)
async def start_profile(request: Request) -> Response:
    """Begin a trace of host and devices in ``profiler_dir``."""
    await state_of(request).llm.call("start_profile")
    return Response(status_code=200)


@dev_router.post("/stop_profile", response_model=None)
async def stop_profile(request: Request) -> Response:
    """End the trace and write it."""
    await state_of(request).llm.call("stop_profile")
    return Response(status_code=200)


@dev_router.get("/server_info", response_model=None)
async def server_info(request: Request) -> Response:
    """Say what the engine is."""
    info = state_of(request).llm.info
    shown = ("model", "vocab_size", "max_model_len", "max_num_seqs", "block_size", "num_blocks")
    return JSONResponse({name: getattr(info, name) for name in shown})


def _cards(state: ServerState) -> list[ModelCard]:
    info = state.llm.info
    return [
        ModelCard(id=name, created=state.created, root=info.model, max_model_len=info.max_model_len)
        for name in state.model_names
    ]
