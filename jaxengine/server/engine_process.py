"""The engine's process: no HTTP, no text; it steps one engine for front ends in other processes.

Its parent gives it one line of JSON on the standard input and keeps that pipe open: when the parent
is gone, however it ended, the pipe closes and this process ends, too.
"""

import contextlib
import faulthandler
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxengine.engine.garbage_collection import exempt_from_garbage_collection
from jaxengine.engine_client import EngineInfo, EngineNews
from jaxengine.engine_loop import EngineLoop, LoopClient
from jaxengine.loaded_engine import LoadedEngine, load_engine, write_tokenizer
from jaxengine.server.connection import ChannelClosedError, Connection, accept
from jaxengine.server.engine_setup import EngineSetup
from jaxengine.server.wire import (
    Message,
    WireError,
    decode_request,
    encode_info,
    encode_news,
    encode_result,
)

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
HUNG_STATUS = 70  # exit status after a step that did not end


class FrontEnd:
    """One connected process: its requests go to the loop, its news to the socket.

    Args:
        connection: Authenticated.
        loop: The engine's.
    """

    def __init__(self, connection: Connection, loop: EngineLoop) -> None:
        self._connection = connection
        self._client: LoopClient = loop.connect()
        self._client.listen(self._tell)

    def serve(self) -> None:
        """Take in messages until the process is gone; what it has left behind is aborted."""
        try:
            while True:
                self._take(self._connection.receive())
        except ChannelClosedError:
            pass
        except WireError as error:
            logger.error("a front end is cut off: %s", error)
        finally:
            self._client.close()
            self._connection.close()

    def _take(self, message: Message) -> None:
        match message:
            case ["add", list(requests)]:
                for values in requests:
                    self._add(values)
            case ["abort", list(numbers)]:
                self._client.abort([str(number) for number in numbers])
            case ["finish", int(number), reason]:
                self._client.finish(str(number), reason)
            case ["call", int(number), str(method), dict(arguments)]:
                self._client.call(method, functools.partial(self._answer, number), **arguments)
            case _:
                raise WireError(f"a message cannot be read: {message!r:.200}")

    def _add(self, values: Any) -> None:
        number = values[0] if isinstance(values, list) and values else None
        if not isinstance(number, int):
            raise WireError(f"a request cannot be read: {values!r:.200}")
        name = str(number)
        try:
            self._client.add([decode_request(name, values)])
        except WireError:
            raise
        except Exception as error:
            self._tell(EngineNews(refused={name: str(error)}))

    def _tell(self, news: EngineNews) -> None:
        self._connection.send(encode_news(news))

    def _answer(self, number: int, result: Any) -> None:
        self._connection.send(["result", number, encode_result(result)])


class EngineProcess:
    """Accepts front ends from the start, and serves them when the engine is loaded.

    Args:
        setup: From the parent.
        load: Loads the engine; called once.
    """

    def __init__(self, setup: EngineSetup, load: Callable[..., LoadedEngine] = load_engine) -> None:
        self._setup = setup
        self._load = load
        self._facts: dict[str, Any] | None = None
        self._failure: str | None = None
        self._loop: EngineLoop | None = None
        self._changed = threading.Condition()  # of the three above
        self._connections: list[Connection] = []

    def run(self) -> int:
        """Serve until the parent is gone or the engine has failed; return the exit status."""
        Path(self._setup.socket_path).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._setup.socket_path)
        os.chmod(self._setup.socket_path, 0o600)
        listener.listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        try:
            loaded = self._load(self._setup.config, self._take_checkpoint)
            loop = self._start_loop(loaded)
        except BaseException as error:
            if not isinstance(error, ValueError):
                logger.exception("the engine cannot start")
            self._fail(str(error) or repr(error))
            return 1
        exempt_from_garbage_collection(owner=self)
        threading.Thread(target=self._watch, args=(loop,), daemon=True).start()
        loop.join()
        logger.error("the engine has ended: %s", loop.death)
        time.sleep(0.2)  # for the last messages to leave
        return 1

    def _start_loop(self, loaded: LoadedEngine) -> EngineLoop:
        methods = {"start_profile": self._start_profile, "stop_profile": jax.profiler.stop_trace}
        loop = EngineLoop(loaded.engine, loaded.info, loaded.new_constraint_factory(), methods)
        if loaded.leader is not None:
            loaded.leader.unfinished_requests = lambda: loop.request_ids
        with self._changed:
            self._loop = loop
            self._changed.notify_all()
        return loop

    def _start_profile(self, prefix: str = "") -> None:
        jax.profiler.start_trace(str(Path(self._setup.config.profiler_dir) / prefix))

    def _take_checkpoint(self, checkpoint: Any) -> None:
        """Tell front ends of the model as soon as it is found, so that they load its tokenizer."""
        directory = self._setup.tokenizer_directory
        named = self._setup.config.tokenizer
        has_files = not self._setup.config.skip_tokenizer_init
        if has_files and (named is None or named.endswith(".gguf")):
            write_tokenizer(self._setup.config, checkpoint, directory)
            named = str(directory)
        facts = {
            "tokenizer": named if has_files else None,
            "eos_token_ids": sorted(checkpoint.eos_token_ids),
            "hf_config": {"architectures": checkpoint.hf_config.get("architectures")},
        }
        with self._changed:
            self._facts = facts
            self._changed.notify_all()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            self._changed.notify_all()
        time.sleep(0.5)  # for those who wait to be told

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection = accept(listener, self._setup.key)
            except OSError as error:
                logger.warning("a front end was refused: %s", error)
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(ChannelClosedError):
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._facts is not None)
            if self._facts is not None:
                connection.send(["model", self._facts])
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._loop is not None)
            if self._failure is not None:
                connection.send(["failed", self._failure])
                return
            assert self._loop is not None
            info: EngineInfo = self._loop.info
            connection.send(["ready", encode_info(info)])
            self._connections.append(connection)
            FrontEnd(connection, self._loop).serve()
        if connection in self._connections:
            self._connections.remove(connection)

    def _watch(self, loop: EngineLoop) -> None:
        """Say every second that the engine lives; end the process if a step does not end."""
        while loop.death is None:
            time.sleep(HEARTBEAT_S)
            age = time.monotonic() - loop.last_step_time if loop.is_working else 0.0
            for connection in list(self._connections):
                with contextlib.suppress(ChannelClosedError):
                    connection.send(["alive", age])
            if age > self._setup.step_timeout_s:
                self._dump_and_exit(loop, age)

    def _dump_and_exit(self, loop: EngineLoop, age: float) -> None:
        print(
            f"error: no step for {age:.0f} s with {len(loop.request_ids)} requests, "
            f"{loop.num_steps} steps before; the threads are at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(HUNG_STATUS)


def end_with_parent() -> None:
    """End this process when the standard input closes (a thread of its own)."""
    with contextlib.suppress(OSError, ValueError):
        while sys.stdin.buffer.read(1 << 16):
            pass
    os._exit(0)


def main(load: Callable[..., LoadedEngine] = load_engine) -> int:
    """Run the process: the setup comes on the standard input."""
    # The parent decides when this process ends; a signal to the whole group is for the parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("jaxengine").setLevel(logging.INFO)
    setup = EngineSetup.from_json(sys.stdin.buffer.readline().decode())
    threading.Thread(target=end_with_parent, daemon=True).start()
    return EngineProcess(setup, load).run()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
