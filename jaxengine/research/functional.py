"""A served model as a pure function of its weights and tokens."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxengine.batch import InputBatch
from jaxengine.engine.device.kv_cache import kv_heads
from jaxengine.engine.device.stage import Stage
from jaxengine.model_config import ModelConfig
from jaxengine.models.decoder import Decoder
from jaxengine.models.options import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.pallas_kernels.target import Target
from jaxengine.research.points import Point, chosen_points, points_of
from jaxengine.sharding import LOGITS_SPEC
from jaxengine.taps import Taps
from jaxengine.weights import Params, merge_params, param_specs

# What stands for the value at a point: an array of its shape, or a function of the value.
Edit = Array | Callable[[Array], Array]
Captured = dict[str, Array]
Functions = dict[str, Callable[[Array], Array]]


class FunctionalModel:
    """The engine's decoder without its cache and its kernels.

    Args:
        stage: The engine's only stage.
        config: The model.
        max_model_len: As the engine has it.

    Raises:
        ValueError: If the model is one of another package's own.
    """

    def __init__(self, stage: Stage, config: ModelConfig, max_model_len: int) -> None:
        self._stage, self._config = stage, config
        self._mesh = stage.parts.mesh
        device = self._mesh.devices.flat[0]
        options = ModelOptions(
            max_model_len=max_model_len,
            target=Target.of(device, implementation="reference"),
            num_shards=self._mesh.size,
            input_major=device.platform == "cpu",  # as the engine holds its weights
        )
        factory = ModelRegistry.resolve(config.architecture)
        self._definition, self._specs = param_specs(lambda: factory(config, options))
        if self._specs != stage.parts.specs:
            raise ValueError(
                f"{config.architecture} holds other weights without its kernels than with them: "
                "functional() needs a model whose weights do not depend on the target"
            )
        self.points = points_of(config.spec)
        self._programs: dict[tuple[tuple[Point, ...], tuple[str, ...]], Any] = {}

    @property
    def weights(self) -> Params:
        """The engine's own arrays by their dotted paths, as they are now: nothing is copied.

        Raises:
            ValueError: If the engine sleeps.
        """
        if not self._stage.params:
            raise ValueError("the engine sleeps and has no weights: call wake_up first")
        return dict(self._stage.params)

    def apply(
        self,
        weights: Mapping[str, Array],
        token_ids: Int[Array, " T"],
        positions: Int[Array, " T"] | None = None,
        segment_ids: Int[Array, " T"] | None = None,
        *,
        capture: str | Iterable[str] = (),
        edits: Mapping[str, Edit] | None = None,
    ) -> Any:
        """Score the next token behind each token. Pure: for jit, grad, jvp, vmap and checkpoint.

        Args:
            weights: As the attribute ``weights``.
            token_ids: Sequences, one behind the other; an id outside of the vocabulary reads zeros.
            positions: Of the tokens in their sequences; None counts from 0 in each segment.
            segment_ids: Tokens of equal ids are one sequence, and see no other; None is one for
                all. Padding is a segment of its own.
            capture: Points to return: names, wildcards and ranges (``points.chosen_points``).
            edits: By the name of a point, wildcards and ranges included: what to go on with
                there, an array or a function of the value. Captures see it.

        Returns:
            Logits [T, V]; with ``capture`` a pair of them and the values by name.

        Raises:
            ValueError: If names or shapes are not the model's.
        """
        tokens, place, segments = _checked(token_ids, positions, segment_ids)
        if unlike := sorted(set(weights) ^ set(self._specs)):
            raise ValueError(
                f"weights lack or add {', '.join(unlike[:5])} ({len(unlike)} in all): pass a tree "
                "with the keys of the model's weights"
            )
        captured = () if not capture else chosen_points(self.points, capture)
        arrays, functions = self._sorted_edits(edits or {}, tokens.shape[0])
        if functions:  # they may close over what is being traced: kept by nobody
            program = self._program(captured, tuple(arrays), functions)
        else:
            key = (captured, tuple(arrays))
            if key not in self._programs:
                self._programs[key] = self._program(*key, {})
            program = self._programs[key]
        logits, seen = program(dict(weights), tokens, place, segments, arrays)
        if not capture:
            return logits
        return logits, {point.name: seen[point.name] for point in captured}

    def _program(
        self, captured: tuple[Point, ...], replaced: tuple[str, ...], functions: Functions
    ) -> Any:
        """The jitted function that ``apply`` calls: where nobody else jits, it is one program too.

        Args:
            captured: What to return.
            replaced: The points that are given an array.
            functions: Those that are given a function.
        """
        is_looked_into = bool(captured or replaced or functions)
        by_name = {point.name: point for point in self.points}
        num_shards = self._mesh.size

        def run(
            weights: Params, tokens: Array, place: Array, segments: Array, arrays: Captured
        ) -> tuple[Array, Captured]:
            model = merge_params(self._definition, weights)
            if not isinstance(model, Decoder):
                raise ValueError(
                    f"{self._config.architecture} has a model of its own, {type(model).__name__}: "
                    "functional() computes those that Decoder does"
                )
            seen: Captured = {}
            names = {point.name for point in captured}

            def see(name: str, value: Array) -> Array:
                if name in arrays:
                    value = arrays[name].astype(value.dtype)
                elif name in functions:
                    value = _edited(functions[name], name, value)
                if name in names:
                    seen[name] = value
                return value

            taps = Taps(see) if is_looked_into else None
            batch = _batch(tokens, place, segments)
            hidden, _ = model(batch, self._caches(tokens.shape[0], num_shards), None, taps)
            return model.compute_logits(hidden, taps), seen

        sharded = jax.shard_map(
            run,
            mesh=self._mesh,
            in_specs=(
                {path: spec.spec for path, spec in self._specs.items()},
                *(P(None), P(None), P(None)),
                {name: by_name[name].spec for name in replaced},
            ),
            out_specs=(LOGITS_SPEC, {point.name: point.spec for point in captured}),
            check_vma=False,
        )
        return jax.jit(sharded)

    def _caches(self, num_tokens: int, num_shards: int) -> list[tuple[Array, Array]]:
        """This shard's keys and values of the tokens at hand, to be filled."""
        heads = kv_heads(self._config, range(self._config.num_layers), num_shards)
        zeros = functools.partial(jnp.zeros, dtype=jnp.dtype(self._config.dtype))
        return [
            (zeros((num_tokens, K // num_shards, 1, k)), zeros((num_tokens, K // num_shards, 1, v)))
            for K, k, v in heads
        ]

    def _sorted_edits(
        self, edits: Mapping[str, Edit], num_tokens: int
    ) -> tuple[Captured, Functions]:
        arrays: Captured = {}
        functions: Functions = {}
        for wanted, edit in edits.items():
            for point in chosen_points(self.points, wanted):
                if callable(edit):
                    if self._mesh.size > 1 and any(point.spec):
                        raise ValueError(
                            f"{point.name} is cut over {self._mesh.size} devices, where a function "
                            "would see a part of it: give an array"
                        )
                    functions[point.name] = edit
                    continue
                shape = tuple(num_tokens if size == "T" else size for size in point.shape)
                if jnp.shape(edit) != shape:
                    raise ValueError(
                        f"the edit of {point.name} has shape {jnp.shape(edit)}, the point {shape}"
                    )
                arrays[point.name] = jnp.asarray(edit)
        return arrays, functions


def _edited(function: Callable[[Array], Array], name: str, value: Array) -> Array:
    edited = jnp.asarray(function(value))
    if edited.shape != value.shape:
        raise ValueError(
            f"the edit of {name} returned shape {edited.shape} for one of {value.shape}: an edit "
            "keeps the shape"
        )
    return edited.astype(value.dtype)


def _checked(token_ids: Any, positions: Any, segment_ids: Any) -> tuple[Array, Array, Array]:
    """The three arrays [T] as int32."""
    tokens = jnp.asarray(token_ids)
    if tokens.ndim != 1 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"token_ids is {tokens.dtype}{list(tokens.shape)}: give integers [T], several "
            "sequences by segment_ids or with jax.vmap"
        )
    segments = jnp.zeros_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
    place = _counted(segments) if positions is None else jnp.asarray(positions)
    for name, array in (("positions", place), ("segment_ids", segments)):
        if array.shape != tokens.shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, token_ids has {tokens.shape[0]} "
                "tokens: give an integer for each"
            )
    return tokens.astype(jnp.int32), place.astype(jnp.int32), segments.astype(jnp.int32)


def _counted(segment_ids: Int[Array, " T"]) -> Int[Array, " T"]:
    """How many tokens of its segment stand before each token."""
    same = segment_ids[:, None] == segment_ids[None, :]
    return jnp.sum(jnp.tril(same, -1), axis=1, dtype=jnp.int32)


def _batch(tokens: Array, positions: Array, segment_ids: Array) -> InputBatch:
    count = tokens.shape[0]
    order = jnp.arange(count, dtype=jnp.int32)
    return InputBatch(
        token_ids=tokens,
        positions=positions,
        slot_mapping=order,
        block_tables=order[None],
        seq_lens=jnp.full(1, count, jnp.int32),
        query_start_loc=jnp.array([0, count], jnp.int32),
        num_decode_rows=jnp.zeros((), jnp.int32),
        logits_indices=order[-1:],
        decode_only=False,
        segment_ids=segment_ids,
    )
