"""A service on Ray Serve: replicas that share their batch among concurrent requests.

The HTTP interface is one path and as small as it can be: ``POST /`` with
``{"prompt": text or token ids}`` or ``{"messages": [...]}``, any sampling parameters beside it, and
``"stream": true`` for server-sent events. It is not OpenAI's.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxengine.engine_thread import EngineThread
from jaxengine.llm import LLM
from jaxengine.on_ray.json_output import as_json, message_of, with_fields
from jaxengine.on_ray.resources import check_engine_arguments, replica_resources
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

Outputs = AsyncGenerator[RequestOutput, None]


class LLMDeployment:
    """One replica: an LLM on a thread of its own, and the HTTP interface to it.

    Args:
        engine_args: Arguments of ``LLM``.
    """

    def __init__(self, engine_args: Mapping[str, Any]) -> None:
        self.llm = LLM(**engine_args)
        self._engine = EngineThread(self.llm)
        self._defaults = self.llm.get_default_sampling_params()

    async def __call__(self, request: Request) -> Response:
        """Answer a request: 400 if it is not possible, 500 if the engine fails."""
        if request.method != "POST":
            return _error(405, f"{request.method} is not offered: POST a JSON object")
        try:
            arguments = parse_request(await request.body(), self._defaults)
            is_stream = arguments.pop("is_stream")
            outputs = self._engine.stream(**arguments)
            if not is_stream:
                return JSONResponse(as_json(await _only(outputs)))
            # The status goes out before the stream: wait until it is known to be good.
            first = await anext(outputs)
        except ValueError as error:
            return _error(400, message_of(error))
        except Exception as error:
            return _error(500, message_of(error))
        return StreamingResponse(_events(first, outputs), media_type="text/event-stream")

    def check_health(self) -> None:
        """Raise if the engine has failed, so that Serve starts another replica in its place."""
        self._engine.check_health()

    def stats(self) -> dict[str, int]:
        """Return how many requests run, and how many steps have been made."""
        return {"num_running": self._engine.num_running, "num_steps": self._engine.num_steps}


def build_app(
    engine_args: Mapping[str, Any],
    autoscaling: Mapping[str, Any] | None = None,
    *,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    max_ongoing_requests: int = 256,
    deployment_class: type[LLMDeployment] = LLMDeployment,
    **options: Any,
) -> serve.Application:
    """Return an application for ``serve.run``.

    Args:
        engine_args: Arguments of ``LLM``, at least ``model``.
        autoscaling: ``min_replicas``, ``max_replicas``, ``target_ongoing_requests`` (the mean that
            a replica shall have) and Serve's other settings; None is one replica.
        num_cpus: Cores that Ray sets aside for a replica.
        num_gpus: GPUs of a replica; None takes as many as it has devices, where there are GPUs.
        max_ongoing_requests: Requests that a replica takes at a time, in its batch or waiting for
            it; further ones wait in the proxy.
        deployment_class: A subclass of ``LLMDeployment``, for another interface.
        options: Further options of a Serve deployment, such as ``health_check_period_s``.

    Raises:
        ValueError: If an engine argument is not possible.
    """
    check_engine_arguments(engine_args)
    if autoscaling is not None:
        options["autoscaling_config"] = dict(autoscaling)
    deploy = serve.deployment(
        ray_actor_options=replica_resources(engine_args, num_cpus, num_gpus),
        max_ongoing_requests=max_ongoing_requests,
        **options,
    )
    return deploy(deployment_class).bind(dict(engine_args))


def parse_request(body: bytes, defaults: SamplingParams) -> dict[str, Any]:
    """Return the arguments of ``LLM.add_request``, and ``is_stream``.

    Args:
        body: A JSON object.
        defaults: Sampling parameters that the object does not name.

    Raises:
        ValueError: If it is something else, or holds fields or values that are not possible.
    """
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the body must be a JSON object, got {fields!r:.100}")
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    is_stream = fields.pop("stream", False)
    if not isinstance(is_stream, bool):
        raise ValueError(f"stream must be true or false, got {is_stream!r:.100}")
    kind = RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL_ONLY
    params = with_fields(defaults, fields).clone(output_kind=kind)
    return {
        "prompt": prompt,
        "messages": messages,
        "sampling_params": params,
        "is_stream": is_stream,
    }


async def _only(outputs: Outputs) -> RequestOutput:
    """Return the only output; a client that goes away cancels this, which aborts its request."""
    async with contextlib.aclosing(outputs):
        return await anext(outputs)


async def _events(first: RequestOutput, outputs: Outputs) -> AsyncIterator[str]:
    """Write outputs as server-sent events, the last of which is [DONE] or an error."""
    async with contextlib.aclosing(outputs):
        yield _event(as_json(first))
        try:
            async for output in outputs:
                yield _event(as_json(output))
        except Exception as error:
            yield _event({"error": {"message": message_of(error)}})
        else:
            yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status)
