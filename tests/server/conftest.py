"""The app over a tiny model, with its engine on a thread of the test's process."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxengine import LLM, AsyncLLM
from jaxengine.engine_loop import EngineLoop
from jaxengine.server.app import create_app
from jaxengine.server.metrics import Metrics
from jaxengine.server.settings import ServerSettings
from jaxengine.server.state import ServerState
from jaxengine.text.frontend import Frontend
from tests.server.asgi import AsgiClient

NewClient = Callable[..., AsgiClient]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of a test's server and client."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def served(llm: LLM) -> Iterator[AsyncLLM]:
    """The shared engine, for coroutines; after the test nothing may be left over in it."""
    loaded = llm._loaded
    loop = EngineLoop(llm.engine, loaded.info, loaded.new_constraint_factory())
    # A thread that starts late would take the requests of a test's llm.generate for its own.
    has_begun = threading.Event()
    loop.put(has_begun.set)
    assert has_begun.wait(30)
    metrics = Metrics("tiny", loaded.info)
    frontend = Frontend(loaded.tokenizer, loaded.info)
    served = AsyncLLM(loop.connect(owns_loop=True), frontend, observer=metrics)
    yield served
    served.shutdown()


@pytest.fixture
def new_client(served: AsyncLLM, runner: asyncio.Runner) -> NewClient:
    """Makes clients of servers with given settings."""

    def new(reasoning_parser: str = "", **settings: Any) -> AsgiClient:
        named = ServerSettings(**{"served_model_name": ["tiny", "also-tiny"], **settings})
        assert isinstance(served.observer, Metrics)
        state = ServerState(served, named, served.observer, reasoning_parser)
        return AsgiClient(create_app(state), state, runner)

    return new


@pytest.fixture
def client(new_client: NewClient) -> AsgiClient:
    """A client of a server with the default settings."""
    return new_client()
