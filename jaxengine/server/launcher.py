"""``serve``: starts the engine's process and those of HTTP, and ends them together."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jaxengine.config import EngineConfig
from jaxengine.server.engine_setup import EngineSetup
from jaxengine.server.http_process import HttpSetup, configure_logging, run_http
from jaxengine.server.metrics import MULTIPROCESS_DIRECTORY
from jaxengine.server.parsers.output_parser import check_parsers
from jaxengine.server.settings import ServerSettings

ENGINE_MODULE = "jaxengine.server.engine_process"
HTTP_MODULE = "jaxengine.server.http_process"
FAREWELL_S = 10.0
BACKLOG = 2048


def serve(
    config: EngineConfig, settings: ServerSettings, *, engine_module: str = ENGINE_MODULE
) -> int:
    """Serve a model until a signal comes or the engine has ended.

    Args:
        config: The engine's.
        settings: The server's.
        engine_module: What runs in the engine's process.

    Returns:
        The exit status: 0 after a signal, 1 if the engine could not start or has failed.

    Raises:
        ValueError: If the flags contradict each other.
        OSError: If the address is in use.
    """
    check_parsers(settings.tool_call_parser, config.reasoning_parser)
    if callable(config.hf_overrides):
        raise ValueError("hf_overrides must be fields here: a function stays in its process")
    configure_logging()
    with (
        contextlib.closing(_bind(settings)) as listener,
        tempfile.TemporaryDirectory(prefix="jaxengine-") as directory,
    ):
        key = secrets.token_bytes(32)
        socket_path = str(Path(directory) / "engine.sock")
        tokenizer_directory = Path(directory) / "tokenizer"
        tokenizer_directory.mkdir()
        setup = EngineSetup(
            config, socket_path, key, tokenizer_directory, settings.engine_step_timeout_s
        )
        http = HttpSetup(config, settings, socket_path, key)
        with _engine_process(setup, engine_module) as engine:
            if settings.api_server_count == 1:
                return run_http(http, listener, lambda: engine.poll() is None)
            os.environ[MULTIPROCESS_DIRECTORY] = str(Path(directory) / "metrics")
            Path(os.environ[MULTIPROCESS_DIRECTORY]).mkdir()
            return _run_several(http, listener, engine)


def _bind(settings: ServerSettings) -> socket.socket:
    """Take the address before the model is loaded; nobody can connect before ``listen``."""
    if settings.uds is not None:
        listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            Path(settings.uds).unlink()
        listener.bind(settings.uds)
        return listener
    family = socket.AF_INET6 if ":" in (settings.host or "") else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host or "", settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"port {settings.port} cannot be taken: {error.strerror}") from None
    return listener


@contextlib.contextmanager
def _engine_process(setup: EngineSetup, module: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the engine's process; it ends when its standard input is closed."""
    # A session of its own: Ctrl-C is for this process, which then drains.
    engine = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, start_new_session=True
    )
    assert engine.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            engine.stdin.write(setup.to_json().encode() + b"\n")
            engine.stdin.flush()
        yield engine
    finally:
        with contextlib.suppress(OSError):
            engine.stdin.close()
        _end([engine])


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + FAREWELL_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run_several(setup: HttpSetup, listener: socket.socket, engine: subprocess.Popen[bytes]) -> int:
    """Run several HTTP processes on one listening socket; the end of one is the end of all."""
    workers = [_http_process(setup, listener) for _ in range(setup.settings.api_server_count)]

    is_told = False

    def forward(number: int, frame: object) -> None:
        nonlocal is_told
        is_told = True
        for worker in workers:
            worker.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    while all(worker.poll() is None for worker in workers) and engine.poll() is None:
        time.sleep(0.1)
    # One has ended by itself: so do the others. Those that drain after a signal must not be told
    # again: it would end their requests.
    if engine.poll() is None and not is_told:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
    deadline = time.monotonic() + setup.settings.shutdown_timeout + FAREWELL_S
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    _end(workers)
    return max(abs(worker.returncode) for worker in workers) and 1


def _http_process(setup: HttpSetup, listener: socket.socket) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, "-m", HTTP_MODULE],
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )
    assert worker.stdin is not None
    told = {"setup": setup.to_json(), "listener": listener.fileno()}
    worker.stdin.write(json.dumps(told).encode() + b"\n")
    worker.stdin.flush()
    return worker
