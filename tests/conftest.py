"""Settings and shared engines of the test session.

jax reads its settings from the environment when it is first imported, which is after this file.
The kernel tests also run where only jax is installed, so nothing else is imported at the top.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Run on the CPU unless GPU tests are wanted; keep compiled programs for the session."""
    if "not gpu" in config.option.markexpr:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    directory = tempfile.mkdtemp(prefix="jaxengine-test-programs-")
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # torch only runs tiny models, whose threads would wait for each other on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
    # A job that a shell has put into the background ignores Ctrl-C, which tests press.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, a chat template and a generation config."""
    from tests.helpers import save_tiny_chat_model

    return save_tiny_chat_model(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="session")
def hf_model(chat_model: Path) -> Any:
    """The same model in transformers: the slow, obvious version."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(chat_model).float().eval()


@pytest.fixture(scope="session")
def _llm(chat_model: Path) -> Any:
    from tests.helpers import make_llm

    return make_llm(chat_model)


@pytest.fixture
def llm(_llm: Any) -> Iterator[Any]:
    """An engine on the tiny model, shared; after each test nothing may be left over in it."""
    from tests.helpers import assert_idle

    _llm.reset_prefix_cache()
    yield _llm
    assert_idle(_llm)
