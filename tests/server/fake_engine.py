"""The engine's process on a device that only counts: quick to start, slow on demand.

    python -m tests.server.fake_engine   # as jaxengine.server.engine_process

The model's directory gives tokenizer and vocabulary; tokens are (length so far) % 64 + 32. A step
takes FAKE_STEP_S seconds, and the whole of HANG_TOKEN's request.
"""

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxengine.config import EngineConfig
from jaxengine.engine.engine import Engine
from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.loaded_engine import LoadedEngine, engine_info
from jaxengine.model_files import read_tokenizer
from jaxengine.server.engine_process import main
from jaxengine.weights import open_model

STEP_S = float(os.environ.get("FAKE_STEP_S", "0.002"))
HANG_TOKEN = 99  # at the end of a prompt: its step never ends
FAIL_TOKEN = 98  # its step fails


class FakeStep:
    """A step that is done when its time has passed."""

    prompt_scores = None

    def __init__(self, step: Any) -> None:
        self.scheduler_output = step
        self._done = time.perf_counter() + STEP_S
        self.sampled = SimpleNamespace(token_ids=SimpleNamespace(is_ready=lambda: True))

    def token_ids(self) -> np.ndarray:
        time.sleep(max(0.0, self._done - time.perf_counter()))
        rows = self.scheduler_output.rows
        for row in rows:
            last = row.request.prompt_token_ids[-1]
            if last == FAIL_TOKEN:
                raise MemoryError("no room on the device")
            if last == HANG_TOKEN:
                time.sleep(3600)
        lengths = [row.num_computed_tokens + row.num_scheduled_tokens for row in rows]
        return np.array(lengths, np.int32) % 64 + 32

    def logprobs(self) -> None:
        return None


class FakeRunner:
    def execute(self, step: Any) -> FakeStep:
        return FakeStep(step)

    def restore_state(self) -> None:
        pass


def load_fake_engine(config: EngineConfig, on_checkpoint: Callable[[Any], Any]) -> LoadedEngine:
    checkpoint = open_model(config.model)
    on_checkpoint(checkpoint)
    tokenizer = read_tokenizer(config, checkpoint)
    vocab_size = checkpoint.hf_config["vocab_size"]
    max_model_len = config.max_model_len or 8192
    num_seqs = config.max_num_seqs or 256
    num_blocks = config.num_gpu_blocks_override or 1 + num_seqs * max_model_len // 16
    scheduler = Scheduler(
        block_pool=BlockPool(num_blocks, config.block_size, config.enable_prefix_caching),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(num_seqs, 8192),
        max_model_len=max_model_len,
    )
    engine = Engine(
        scheduler,
        FakeRunner(),  # type: ignore[arg-type]
        model_config=SimpleNamespace(vocab_size=vocab_size),  # type: ignore[arg-type]
        eos_token_ids=frozenset(),
    )
    info = engine_info(config, engine, [], {}, 0.0)
    return LoadedEngine(config, checkpoint, engine, [], info, tokenizer, None, None)


if __name__ == "__main__":
    status = main(load_fake_engine)
    sys.stderr.flush()
    os._exit(status)
