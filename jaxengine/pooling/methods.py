"""The methods of ``LLM`` for models that return vectors and scores instead of text."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxengine.llm_arguments import refuse_foreign
from jaxengine.pooling.engine import PoolingEngine
from jaxengine.pooling.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from jaxengine.pooling.params import PoolingParams
from jaxengine.pooling.pooler import unit
from jaxengine.pooling.runner import TokenSequence
from jaxengine.text.progress import MakeBar, Progress
from jaxengine.text.prompts import Prompt, as_list

Prompts = Prompt | Sequence[Prompt]
Params = PoolingParams | Sequence[PoolingParams] | None
Run = Callable[[Sequence[TokenSequence], Sequence[PoolingParams]], Iterator[np.ndarray]]


class PoolingMethods:
    """What an ``LLM`` of a pooling model can do; with any other model it is an error."""

    _pooling: PoolingEngine | None = None

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling_params: Params = None,
        use_tqdm: bool | MakeBar = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Return the embedding of each prompt.

        Args:
            prompts: Text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``; or a
                list of such.
            pooling_params: For all prompts, or one for each.
            use_tqdm: Draw a progress bar; or what makes the bar.
            truncate_prompt_tokens: Most tokens of a prompt; -1: what the model can read.
            lora_request: Must be None.
            tokenization_kwargs: ``add_special_tokens``, ``truncate_prompt_tokens``.

        Returns:
            One output a prompt, in their order; ``.outputs.embedding`` is a list of floats.

        Raises:
            ValueError: If the model makes no embeddings, or a prompt is empty or too long. No
                prompt has run then.
        """
        refuse_foreign(lora_request=lora_request)
        engine = self._pooling_engine("embed")
        given = truncate_prompt_tokens, tokenization_kwargs
        found = _run(engine, engine.embed, as_list(prompts), pooling_params, *given, use_tqdm)
        return [
            EmbeddingRequestOutput(request_id, EmbeddingOutput(vector.tolist()), token_ids)
            for request_id, vector, token_ids in found
        ]

    def encode(
        self,
        prompts: Prompts,
        pooling_params: Params = None,
        *,
        use_tqdm: bool | MakeBar = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: Any = None,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """Return what the model makes of each prompt, as arrays.

        Args:
            prompts: As for ``embed``; so are the others without a line here.
            pooling_params: For all prompts, or one for each.
            use_tqdm: Draw a progress bar; or what makes the bar.
            truncate_prompt_tokens: Most tokens of a prompt.
            lora_request: Must be None.
            pooling_task: "embed", "token_embed" (each token's last layer) or "classify"; None for
                the model's own.
            tokenization_kwargs: As for ``embed``.

        Returns:
            One output a prompt, in their order; ``.outputs.data`` is a float32 numpy array.

        Raises:
            ValueError: As ``embed``; also if there is no such task.
        """
        refuse_foreign(lora_request=lora_request)
        task = pooling_task or self._pooling_engine(None).tasks[0]
        engine = self._pooling_engine("embed" if task == "token_embed" else task)
        runs: dict[str, Run] = {
            "embed": engine.embed,
            "token_embed": engine.embed_tokens,
            "classify": engine.classify,
        }
        if task not in runs:
            raise ValueError(f"pooling_task is {task!r}: use one of {', '.join(runs)}")
        given = truncate_prompt_tokens, tokenization_kwargs
        found = _run(engine, runs[task], as_list(prompts), pooling_params, *given, use_tqdm)
        return [
            PoolingRequestOutput(request_id, PoolingOutput(data), token_ids)
            for request_id, data, token_ids in found
        ]

    def classify(
        self,
        prompts: Prompts,
        *,
        pooling_params: Params = None,
        use_tqdm: bool | MakeBar = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Return a probability for each label of each prompt; arguments as for ``embed``.

        Returns:
            One output a prompt, in their order; ``.outputs.probs`` is a list of floats.

        Raises:
            ValueError: As ``embed``.
        """
        refuse_foreign(lora_request=lora_request)
        engine = self._pooling_engine("classify")
        given = truncate_prompt_tokens, tokenization_kwargs
        found = _run(engine, engine.classify, as_list(prompts), pooling_params, *given, use_tqdm)
        return [
            ClassificationRequestOutput(request_id, ClassificationOutput(probs.tolist()), token_ids)
            for request_id, probs, token_ids in found
        ]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        use_tqdm: bool | MakeBar = True,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """Return how well texts fit together.

        A classifier of one label (a cross-encoder, or reranker) reads both texts of a pair at
        once; a model of embeddings reads each alone, and the score is the cosine of their angle.

        Args:
            data_1: One text, or as many as ``data_2`` has.
            data_2: A text, or a list of them.
            use_tqdm: Draw a progress bar; or what makes the bar.
            pooling_params: Of all pairs.
            truncate_prompt_tokens: Most tokens of a sequence; -1: what the model can read.
            lora_request: Must be None.
            tokenization_kwargs: As for ``embed``.

        Returns:
            One output a pair, in the order of ``data_2``; ``.outputs.score`` is a float.

        Raises:
            ValueError: If the model cannot score, the numbers of texts do not fit, or a text is
                empty or too long.
        """
        refuse_foreign(lora_request=lora_request)
        engine = self._pooling_engine("score")
        pairs = _pairs(data_1, data_2)
        params = pooling_params or PoolingParams()
        given = truncate_prompt_tokens, tokenization_kwargs
        if "classify" in engine.tasks:
            sequences = engine.encode_pairs(pairs, *given)
            found = engine.classify(sequences, [params] * len(sequences))
            scores = [float(each[0]) for each in _watched(found, len(sequences), use_tqdm)]
            read = [list(each.token_ids) for each in sequences]
        else:
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))  # each runs once
            sequences = engine.encode(texts, *given)
            found = engine.embed(sequences, [params] * len(sequences))
            vectors = dict(zip(texts, _watched(found, len(sequences), use_tqdm), strict=True))
            tokens = dict(zip(texts, sequences, strict=True))
            scores = [cosine(vectors[one], vectors[two]) for one, two in pairs]
            read = [_joined(tokens[one], tokens[two]) for one, two in pairs]
        return [
            ScoringRequestOutput(engine.next_request_id(), ScoringOutput(score), token_ids)
            for score, token_ids in zip(scores, read, strict=True)
        ]

    def _pooling_engine(self, task: str | None) -> PoolingEngine:
        """The engine, if the model can do a task.

        Raises:
            ValueError: If it cannot.
        """
        if self._pooling is None:
            raise ValueError(
                f"this model generates text, and does not support the task {task or 'encode'!r}: "
                "load an encoder (docs/pooling.md), or use generate"
            )
        if task is not None and task != "token_embed":
            self._pooling.require(task)
        return self._pooling


class NoGenerator:
    """Stands where the parts of a generating ``LLM`` are; whatever is asked of it is an error."""

    def __init__(self, engine: PoolingEngine) -> None:
        tasks, name = " and ".join(engine.tasks), engine.model_config.architecture
        self._refusal = f"{name} does not support the task 'generate': it can {tasks}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and debuggers look for
            raise AttributeError(name)
        raise ValueError(self._refusal)


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    """The cosine of the angle between two vectors."""
    return float(np.sum(unit(one) * unit(two), dtype=np.float64))


def _run(
    engine: PoolingEngine,
    run: Run,
    prompts: Sequence[Prompt],
    params: Params,
    truncate_prompt_tokens: int | None,
    options: Mapping[str, Any] | None,
    use_tqdm: bool | MakeBar,
) -> list[tuple[str, np.ndarray, list[int]]]:
    """The id, the result and the tokens of each prompt, in their order."""
    sequences = engine.encode(prompts, truncate_prompt_tokens, options)
    found = run(sequences, _each(params, len(sequences)))
    return [
        (engine.next_request_id(), result, list(each.token_ids))
        for each, result in zip(sequences, _watched(found, len(sequences), use_tqdm), strict=True)
    ]


def _joined(one: TokenSequence, two: TokenSequence) -> list[int]:
    return [*one.token_ids, *two.token_ids]


def _pairs(one: str | Sequence[str], two: str | Sequence[str]) -> list[tuple[str, str]]:
    firsts = [one] if isinstance(one, str) else list(one)
    seconds = [two] if isinstance(two, str) else list(two)
    for each in (*firsts, *seconds):
        if not isinstance(each, str):
            raise ValueError(f"score needs texts, got {each!r:.200}")
    if len(firsts) == 1:
        firsts *= len(seconds)
    if len(firsts) != len(seconds) or not firsts:
        raise ValueError(
            f"score was given {len(firsts)} and {len(seconds)} texts: give one and any number, or "
            "as many of both"
        )
    return list(zip(firsts, seconds, strict=True))


def _each(params: Params, count: int) -> list[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return [params or PoolingParams()] * count
    if len(params) != count:
        raise ValueError(
            f"there are {count} prompts and {len(params)} pooling_params: give as many"
        )
    return list(params)


def _watched(
    found: Iterable[np.ndarray], total: int, use_tqdm: bool | MakeBar
) -> Iterator[np.ndarray]:
    with Progress(total, use_tqdm) as progress:
        for each in found:
            yield each
            progress.advance(1)
