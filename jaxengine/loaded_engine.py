"""Loads a model with what serves it: engine, tokenizer, sampling defaults, other hosts."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.distributed.launch import start_leader
from jaxengine.distributed.leader import Leader
from jaxengine.engine.build import check_hf_config
from jaxengine.engine.engine import Engine
from jaxengine.engine.replicas import ReplicaGroup, build_replicas, startup_text
from jaxengine.engine.start_report import Startup
from jaxengine.engine_client import EngineInfo
from jaxengine.model_config import ModelConfig
from jaxengine.model_files import read_sampling_defaults, read_tokenizer
from jaxengine.pooling.engine import PoolingEngine
from jaxengine.process import check_devices, prepare_process
from jaxengine.structured.constraint_factory import ConstraintFactory
from jaxengine.structured.reasoning import markers_of
from jaxengine.text.messages import load_chat_template
from jaxengine.text.tokenizer import Tokenizer
from jaxengine.weights import Checkpoint, open_model


@dataclasses.dataclass
class LoadedEngine:
    """A model that is ready to serve.

    Attributes:
        engine: One, or a group of replicas.
        startups: What the start of each replica did.
        info: What front ends are told.
        tokenizer: None with ``skip_tokenizer_init``.
        leader: Of several hosts; None with one.
    """

    config: EngineConfig
    checkpoint: Checkpoint
    engine: Engine | ReplicaGroup
    startups: list[Startup]
    info: EngineInfo
    tokenizer: Tokenizer | None
    chat_template: str | None
    leader: Leader | None

    @property
    def replicas(self) -> tuple[Engine, ...]:
        """The engines, one or several."""
        return self.engine.replicas if isinstance(self.engine, ReplicaGroup) else (self.engine,)

    def new_constraint_factory(self) -> ConstraintFactory | None:
        """Return what makes the constraints of requests; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return ConstraintFactory(
            self.tokenizer.hf_tokenizer,
            self.info.vocab_size,
            self.info.eos_token_ids,
            reasoning_parser=self.config.reasoning_parser,
        )


def load_engine(
    config: EngineConfig, on_checkpoint: Callable[[Checkpoint], Any] = lambda _: None
) -> LoadedEngine:
    """Load a model and make it ready to serve.

    Args:
        config: What the user asked for.
        on_checkpoint: Called when the model is found and judged, before its weights are read.

    Raises:
        ValueError: If the model is not supported or damaged, or does not fit into memory.
    """
    return _load_engine(config, _open(config), on_checkpoint)


def load_model(config: EngineConfig) -> LoadedEngine | PoolingEngine:
    """Load a model with the engine that serves its kind.

    Raises:
        ValueError: As ``load_engine``; also if the model cannot do ``config.task``.
    """
    checkpoint = _open(config)
    if not _is_encoder(checkpoint):
        return _load_engine(config, checkpoint)
    tokenizer = None if config.skip_tokenizer_init else read_tokenizer(config, checkpoint)
    return PoolingEngine(config, checkpoint, tokenizer)


def _open(config: EngineConfig) -> Checkpoint:
    """Find and judge a model."""
    load_chat_template(config.chat_template)  # refused before anything is loaded
    markers_of(config.reasoning_parser)
    prepare_process(config)
    if config.nnodes == 1:  # several hosts first have to find each other
        check_devices()
    checkpoint = open_model(config.model, config.load_format, config.revision, config.hf_overrides)
    check_hf_config(checkpoint.hf_config)
    return checkpoint


def _is_encoder(checkpoint: Checkpoint) -> bool:
    return ModelConfig.from_hf(checkpoint.hf_config).spec.is_encoder


def _check_generates(config: EngineConfig, checkpoint: Checkpoint) -> None:
    architecture = ModelConfig.from_hf(checkpoint.hf_config).architecture
    if _is_encoder(checkpoint):
        raise ValueError(
            f"{architecture} makes no text: it is served offline, by LLM(...).embed, classify or "
            "score (docs/pooling.md)"
        )
    if config.task not in ("auto", "generate"):
        raise ValueError(
            f"{architecture} does not support the task {config.task!r}: it can generate; "
            "docs/pooling.md lists the models that embed, classify and score"
        )


def _load_engine(
    config: EngineConfig,
    checkpoint: Checkpoint,
    on_checkpoint: Callable[[Checkpoint], Any] = lambda _: None,
) -> LoadedEngine:
    started = time.perf_counter()
    _check_generates(config, checkpoint)
    chat_template = load_chat_template(config.chat_template)
    defaults = read_sampling_defaults(config, checkpoint)
    on_checkpoint(checkpoint)
    leader = None if config.nnodes == 1 else start_leader(config, checkpoint.hf_config)
    tokenizer: Tokenizer | None = None
    eos_token_ids = frozenset(checkpoint.eos_token_ids)
    if not config.skip_tokenizer_init:
        tokenizer = read_tokenizer(config, checkpoint)
        eos_token_ids |= tokenizer.eos_token_ids
    if leader is None:
        engine, startups = build_replicas(config, checkpoint, eos_token_ids)
    else:
        with leader.closed_on_failure():
            engine, startups = build_replicas(config, checkpoint, eos_token_ids, leader.hooks)
            leader.wait_until_ready()
    seconds = time.perf_counter() - started
    if not config.disable_log_stats:
        print(f"{startup_text(startups)}\n  ready after {seconds:.1f} s", file=sys.stderr)
    info = engine_info(config, engine, startups, defaults, seconds)
    return LoadedEngine(
        config, checkpoint, engine, startups, info, tokenizer, chat_template, leader
    )


def engine_info(
    config: EngineConfig,
    engine: Engine | ReplicaGroup,
    startups: list[Startup],
    sampling_defaults: dict[str, Any],
    started_s: float,
) -> EngineInfo:
    """Collect what front ends are told of an engine."""
    replicas = engine.replicas if isinstance(engine, ReplicaGroup) else (engine,)
    scheduler = replicas[0].scheduler
    pool = scheduler.block_pool
    return EngineInfo(
        model=config.model,
        vocab_size=engine.model_config.vocab_size,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs * len(replicas),
        block_size=pool.block_size,
        num_blocks=pool.num_usable_blocks * len(replicas),
        max_prompt_len=scheduler.max_prompt_len,
        eos_token_ids=engine.eos_token_ids,
        max_logprobs=config.max_logprobs,
        sampling_defaults=sampling_defaults,
        compile_seconds=[s for each in startups for s in each.compile_seconds.values()],
        started_s=started_s,
    )


def write_tokenizer(config: EngineConfig, checkpoint: Checkpoint, directory: Path) -> None:
    """Put the tokenizer's files where another process can load them without the checkpoint.

    Raises:
        ValueError: If they cannot be read.
    """
    source = checkpoint if config.tokenizer is None else open_model(config.tokenizer)
    source.write_tokenizer(directory)
