"""Runs a batch file through the server's own routes, in this process and without a socket."""

import asyncio
import logging
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from tqdm import tqdm

from jaxengine.async_llm import AsyncLLM
from jaxengine.server.app import create_app
from jaxengine.server.batch_file import (
    BatchOutput,
    BatchRequest,
    answer,
    check_names,
    read_requests,
    refusal,
)
from jaxengine.server.metrics import Metrics
from jaxengine.server.settings import ServerSettings
from jaxengine.server.state import ServerState

logger = logging.getLogger(__name__)


async def run_batch(
    llm: AsyncLLM,
    settings: ServerSettings,
    output: BatchOutput,
    input_file: Path,
    *,
    reasoning_parser: str = "",
    max_concurrency: int | None = None,
    show_progress: bool = True,
) -> int:
    """Answer every line of the input that the output does not answer yet.

    Args:
        llm: The model.
        settings: How it is served; keys and queues do not count here.
        output: Of ``input_file``.
        input_file: The requests.
        reasoning_parser: How the model marks its reasoning.
        max_concurrency: Requests at a time; None is twice what the engine runs at a time.
        show_progress: Draw a bar.

    Returns:
        The number of lines that this call has answered.

    Raises:
        EngineDeadError: If the engine fails; what is answered stays so.
        OSError: If the output cannot be written.
    """
    metrics = Metrics((settings.served_model_name or [llm.info.model])[0], llm.info)
    llm.observer = metrics
    app = create_app(ServerState(llm, settings, metrics, reasoning_parser))
    done_before = len(output.done)
    todo = (each for each in read_requests(input_file) if each.key not in output.done)
    limit = max_concurrency or 2 * llm.info.max_num_seqs
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://batch") as client:
        with tqdm(desc="requests", disable=not show_progress, file=sys.stderr) as bar:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(limit):
                        group.create_task(_work(client, llm, todo, output, bar))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None  # a full disk fails for all alike
    await llm.check_health()
    return len(output.done) - done_before


async def _work(
    client: httpx2.AsyncClient,
    llm: AsyncLLM,
    todo: Iterator[BatchRequest],
    output: BatchOutput,
    bar: Any,
) -> None:
    for request in todo:
        name = secrets.token_hex(16)
        if request.problem:
            line = refusal(request, name)
        else:
            reply = await client.post(
                request.url, json=request.body, headers={"X-Request-Id": name}, timeout=None
            )
            if llm.errored:  # the request is not to blame: another run shall do it
                return
            line = answer(request, reply.status_code, name, reply.json())
        output.write(request, line)
        bar.update()
        await asyncio.sleep(0)  # lines that are refused at once must not hold the others up


def open_output(input_file: Path, output_file: Path) -> BatchOutput:
    """Check the input, and open the output for what it lacks.

    Raises:
        ValueError: If one of them is not possible.
    """
    keys = check_names(input_file)
    if output_file.exists() and output_file.samefile(input_file):
        raise ValueError(f"--output-file is the --input-file {str(input_file)!r}: name another one")
    output = BatchOutput(output_file, keys)
    if output.done:
        logger.info("%d of %d lines are answered already", len(output.done), len(keys))
    return output
