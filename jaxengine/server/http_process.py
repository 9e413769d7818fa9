"""The process that speaks HTTP: tokenizes, makes text, and asks the engine's process for tokens."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from jaxengine.async_llm import AsyncLLM
from jaxengine.config import EngineConfig
from jaxengine.engine_client import EngineDeadError
from jaxengine.server.app import create_app
from jaxengine.server.header_timeout import http_protocol
from jaxengine.server.metrics import LOG_INTERVAL_S, Metrics
from jaxengine.server.settings import ServerSettings
from jaxengine.server.socket_client import SocketClient
from jaxengine.server.state import ServerState
from jaxengine.text.frontend import Frontend
from jaxengine.text.messages import load_chat_template
from jaxengine.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("jaxengine.server")

POLL_S = 0.05
FAREWELL_S = 5  # for errors to reach the clients of a dead engine


@dataclasses.dataclass(frozen=True)
class HttpSetup:
    """What such a process is told.

    Attributes:
        config: The engine's.
        settings: The server's.
        socket_path: Where the engine listens.
        key: Its secret.
    """

    config: EngineConfig
    settings: ServerSettings
    socket_path: str
    key: bytes

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps({**dataclasses.asdict(self), "key": self.key.hex()})

    @classmethod
    def from_json(cls, text: str) -> "HttpSetup":
        """Read what ``to_json`` has written."""
        values = json.loads(text)
        return cls(
            EngineConfig(**values["config"]),
            ServerSettings(**values["settings"]),
            values["socket_path"],
            bytes.fromhex(values["key"]),
        )


class HttpServer(uvicorn.Server):
    """Drains at the first signal, and ends at the second.

    Attributes:
        state: Of the app.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state

    def end(self) -> None:
        """Take no more requests and let the running ones end; called again, end them."""
        if self.should_exit:
            self.force_exit = True
        else:
            logger.info("draining %d requests", self.state.num_requests)
        self.state.is_draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self.end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT; uvicorn's own would be raised again at the end."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def serve_http(
    setup: HttpSetup, listener: socket.socket, is_engine_alive: Callable[[], bool]
) -> int:
    """Connect to the engine, and serve until a signal comes or the engine has ended.

    Args:
        setup: What to serve.
        listener: Bound; it listens when the engine is ready.
        is_engine_alive: Whether the engine's process runs, as far as is known here.

    Returns:
        The exit status.
    """
    try:
        llm, metrics = await _connect(setup, is_engine_alive)
    except (EngineDeadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    state = ServerState(llm, setup.settings, metrics, setup.config.reasoning_parser)
    server = HttpServer(_uvicorn_config(setup.settings, state), state)

    def end_with_engine() -> None:
        logger.error("the engine is dead, so the server ends: %s", llm.dead_error)
        server.config.timeout_graceful_shutdown = FAREWELL_S
        state.is_draining = server.should_exit = True

    llm.on_death = end_with_engine
    logging_stats = asyncio.create_task(_log_stats(metrics, setup.config.disable_log_stats))
    name = listener.getsockname()
    logger.info("serving %s at %s", ", ".join(state.model_names), name)
    try:
        await server.serve(sockets=[listener])
    finally:
        logging_stats.cancel()
        llm.shutdown()
    return 1 if llm.errored else 0


async def _connect(
    setup: HttpSetup, is_engine_alive: Callable[[], bool]
) -> tuple[AsyncLLM, Metrics]:
    while not Path(setup.socket_path).exists():  # it appears when the engine's process listens
        if not is_engine_alive():
            raise EngineDeadError("the engine's process has ended at its start")
        await asyncio.sleep(POLL_S)
    client = await SocketClient.open(setup.socket_path, setup.key)
    facts = await client.receive_facts()
    tokenizer = await asyncio.to_thread(_load_tokenizer, setup.config, facts)
    await client.wait_until_ready()
    name = (setup.settings.served_model_name or [client.info.model])[0]
    metrics = Metrics(name, client.info)
    chat_template = load_chat_template(setup.config.chat_template)
    frontend = Frontend(tokenizer, client.info, chat_template)
    return AsyncLLM(client, frontend, observer=metrics, runs_in_loop=True), metrics


def _load_tokenizer(config: EngineConfig, facts: Any) -> Tokenizer | None:
    if facts.get("tokenizer") is None:
        return None
    return load_tokenizer(
        facts["tokenizer"],
        generation_config={"eos_token_id": facts.get("eos_token_ids")},
        revision=config.tokenizer_revision,
    )


async def _log_stats(metrics: Metrics, is_disabled: bool) -> None:
    while not is_disabled:
        await asyncio.sleep(LOG_INTERVAL_S)
        if (line := metrics.log_line()) is not None:
            logger.info("%s", line)


def _uvicorn_config(settings: ServerSettings, state: ServerState) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(state),
        http=http_protocol(settings.request_timeout_s),
        lifespan="off",
        ws="none",
        log_level=settings.uvicorn_log_level,
        access_log=not settings.disable_uvicorn_access_log,
        root_path=settings.root_path,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=settings.ssl_cert_reqs,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout)),
    )


def run_http(setup: HttpSetup, listener: socket.socket, is_engine_alive: Callable[[], bool]) -> int:
    """Run ``serve_http`` on an event loop of its own."""
    try:
        import uvloop  # where there is one: not on Windows

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        return runner.run(serve_http(setup, listener, is_engine_alive))


def configure_logging() -> None:
    """Write our own lines as uvicorn writes its."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s:     %(message)s")
    logging.getLogger("jaxengine").setLevel(logging.INFO)


def main() -> int:
    """Run one of several HTTP processes: the setup comes on the standard input."""
    configure_logging()
    values = json.loads(sys.stdin.buffer.readline())
    listener = socket.socket(fileno=values["listener"])
    setup = HttpSetup.from_json(values["setup"])
    return run_http(setup, listener, is_engine_alive=lambda: True)


if __name__ == "__main__":
    sys.exit(main())
