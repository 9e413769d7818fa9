"""PoolingEngine: texts in, embeddings, probabilities and scores out. A model on one device."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxengine.config import EngineConfig
from jaxengine.engine.build import read_model_config
from jaxengine.engine.limits import resolve_limits
from jaxengine.models.encoder import Encoder
from jaxengine.models.options import ModelOptions
from jaxengine.pallas_kernels.target import Target
from jaxengine.pooling.params import PoolingParams
from jaxengine.pooling.pooler import Pooler, probabilities, read_pooler, unit
from jaxengine.pooling.runner import EncoderRunner, Output, TokenSequence
from jaxengine.sharding import make_mesh
from jaxengine.text.prompts import Prompt, checked, parse_prompt
from jaxengine.text.tokenizer import Tokenizer, required
from jaxengine.weights import Checkpoint, load_params, param_specs, random_params

BACKENDS = ("reference", "xla", "triton")  # of attention without a cache


class PoolingEngine:
    """An encoder, its tokenizer, and what it can do.

    Requests need no state between steps: each call packs its sequences into steps of at most
    ``max_num_batched_tokens`` tokens. It may be called from several threads.

    Args:
        config: What the user asked for.
        checkpoint: Of an encoder.
        tokenizer: None to take token ids only.

    Attributes:
        model_config: The model.
        tokenizer: As given.
        max_model_len: Longest sequence, in tokens.
        tasks: What the model can do: "embed" and "score", or "classify" and, with one label,
            "score".

    Raises:
        ValueError: If the config asks for what the model cannot do, or the checkpoint is damaged.
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None
    ) -> None:
        device = jax.devices()[0]
        self.model_config = model = read_model_config(config, checkpoint, device)
        self.tokenizer = tokenizer
        labels = model.spec.labels
        self.tasks: tuple[str, ...] = ("embed", "score")
        if labels is not None:
            self.tasks = ("classify", "score") if labels.num_labels == 1 else ("classify",)
        if config.task not in ("auto", "pooling"):
            self.require(config.task)
        _check_size(config)
        self.pooler = _read_pooler(config, checkpoint) if labels is None else Pooler()
        limits = resolve_limits(config, model, device)
        own = self.pooler.max_seq_length or limits.max_model_len
        self.max_model_len = config.max_model_len or min(own, limits.max_model_len)
        backend = config.attention_backend
        options = ModelOptions(
            max_model_len=self.max_model_len,
            target=Target.of(device),
            attention_backend=backend if backend in BACKENDS else None,
            input_major=device.platform == "cpu",
        )
        definition, specs = param_specs(lambda: Encoder(model, options))
        mesh = make_mesh([device])
        if config.load_format == "dummy":
            params = random_params(specs, mesh, config.seed)
        else:
            shows = not config.disable_log_stats
            params = load_params(checkpoint, specs, mesh, show_progress=shows)
        self._runner = EncoderRunner(
            definition,
            {path: spec.spec for path, spec in specs.items()},
            params,
            device,
            # A sequence sees all of itself, so that it is never cut over steps.
            max_num_batched_tokens=max(limits.max_num_batched_tokens, self.max_model_len),
            max_num_seqs=limits.max_num_seqs,
        )
        self._numbers = itertools.count()

    def require(self, task: str) -> None:
        """Refuse what the model cannot do.

        Raises:
            ValueError: Naming what it can.
        """
        if task not in self.tasks:
            raise ValueError(
                f"{self.model_config.architecture} does not support the task {task!r}: it can "
                f"{' and '.join(self.tasks)}"
            )

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ValueError: If there is none.
        """
        return required(self.tokenizer)

    def next_request_id(self) -> str:
        """Return a name that no other request of the engine has."""
        return str(next(self._numbers))

    def encode(
        self,
        prompts: Sequence[Prompt],
        truncate_prompt_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[TokenSequence]:
        """Bring prompts into tokens.

        Args:
            prompts: Texts, token ids, or dicts of them.
            truncate_prompt_tokens: Most tokens of each, special ones included; of token ids the
                last so many; -1 for what the model can read.
            options: ``tokenization_kwargs``: ``truncate_prompt_tokens``, ``add_special_tokens``.

        Raises:
            ValueError: If one is empty, too long, or holds a token that the model does not have.
        """
        limit, adds = self._limit(truncate_prompt_tokens, options)
        parsed = [parse_prompt(prompt) for prompt in prompts]
        texts = [each.text for each in parsed if each.token_ids is None and each.text is not None]
        encoded = iter(self._tokens_of(texts, None, limit, adds))
        sequences = []
        for number, (text, token_ids, _) in enumerate(parsed):
            if token_ids is None:
                if not text:
                    raise ValueError(f"text {number} is empty: give at least one word")
                sequences.append(self._checked(number, next(encoded)))
                continue
            kept = token_ids if limit is None else token_ids[-limit:]
            sequences.append(self._checked(number, TokenSequence(kept, [0] * len(kept))))
        return sequences

    def encode_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        truncate_prompt_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[TokenSequence]:
        """Bring pairs of texts into one sequence each, with the tokenizer's token types.

        With a limit the longer text of a pair is cut first. Raises as ``encode``.
        """
        limit, adds = self._limit(truncate_prompt_tokens, options)
        for number, pair in enumerate(pairs):
            if not all(pair):
                raise ValueError(f"a text of pair {number} is empty: give at least one word")
        firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
        found = self._tokens_of(firsts, seconds, limit, adds)
        return [self._checked(number, each) for number, each in enumerate(found)]

    def embed(
        self, sequences: Sequence[TokenSequence], params: Sequence[PoolingParams]
    ) -> Iterator[np.ndarray]:
        """Give the embedding of each sequence, float32."""
        self.require("embed")
        for each in params:
            self.pooler.check_dimensions(each, self.model_config.hidden_size)
        kind: Output = self.pooler.kind  # type: ignore[assignment]
        pooled = self._runner.run(sequences, kind)
        return map(self.pooler.embedding, pooled, params)

    def embed_tokens(
        self, sequences: Sequence[TokenSequence], params: Sequence[PoolingParams]
    ) -> Iterator[np.ndarray]:
        """Give the last layer's output [tokens, D] of each sequence, at length 1 if asked for."""
        self.require("embed")
        for rows, each in zip(self._runner.run(sequences, "tokens"), params, strict=True):
            yield np.stack([unit(row) for row in rows]) if each.activates else rows.copy()

    def classify(
        self, sequences: Sequence[TokenSequence], params: Sequence[PoolingParams]
    ) -> Iterator[np.ndarray]:
        """Give a probability for each label of each sequence, or the plain scores if asked for."""
        self.require("classify")
        for logits, each in zip(self._runner.run(sequences, "labels"), params, strict=True):
            plain = each.activates is False
            yield logits if plain else probabilities(logits, self.model_config.hf_config)

    def _limit(
        self, limit: int | None, options: Mapping[str, Any] | None
    ) -> tuple[int | None, bool]:
        """Most tokens of a sequence, and whether special tokens are added."""
        given = dict(options or {})
        adds = given.pop("add_special_tokens", None)
        limit = given.pop("truncate_prompt_tokens", None) if limit is None else limit
        for name in given:
            raise ValueError(
                f"tokenization_kwargs has no {name!r} here: use add_special_tokens, "
                "truncate_prompt_tokens"
            )
        if limit == -1:
            limit = self.max_model_len
        is_number = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (is_number and 1 <= limit <= self.max_model_len):
            raise ValueError(
                f"truncate_prompt_tokens is {limit!r}: use -1 or 1 to {self.max_model_len}, the "
                "longest sequence of the model"
            )
        return limit, adds is not False

    def _tokens_of(
        self, texts: list[str], seconds: list[str] | None, limit: int | None, adds: bool
    ) -> list[TokenSequence]:
        if not texts:
            return []
        tokenizer = self.require_tokenizer()
        if self.pooler.lowers_case:
            texts = [text.lower() for text in texts]
        found = tokenizer.encode_typed(texts, seconds, max_length=limit, adds_special=adds)
        return [TokenSequence(*each) for each in found]

    def _checked(self, number: int, sequence: TokenSequence) -> TokenSequence:
        length, longest = len(sequence.token_ids), self.max_model_len
        if not length:
            raise ValueError(f"prompt {number} has no tokens: give at least one")
        if length > longest:
            raise ValueError(
                f"prompt {number} has {length} tokens, and this model reads at most {longest}: "
                "shorten it, or pass truncate_prompt_tokens=-1 to have it cut there"
            )
        checked(number, sequence.token_ids, self.model_config.vocab_size)
        return sequence


def _check_size(config: EngineConfig) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes"):
        if getattr(config, name) != 1:
            raise ValueError(
                f"{name} is {getattr(config, name)}: encoders run on one device; leave it at 1"
            )


def _read_pooler(config: EngineConfig, checkpoint: Checkpoint) -> Pooler:
    if checkpoint.format == "converted" and not config.pooler_config:
        raise ValueError(
            f"{checkpoint.source} is a converted directory, which does not keep how the model "
            "pools: say it, as in pooler_config={'pooling_type': 'mean', 'normalize': True}, or "
            "load the original directory"
        )
    return read_pooler(Path(checkpoint.source), checkpoint.hf_config, config.pooler_config)
