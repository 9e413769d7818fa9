"""The jitted programs of a step: forward, greedy sampling, block-table updates.

Each is a pure function of device arrays and one packed vector from the host. Caches, tables and
last tokens are donated: they are updated in place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.batch import StepShape, build_input_batch, split_packed, update_tables
from jaxengine.engine.kv_cache import CACHE_SPEC
from jaxengine.engine.logprobs import TokenLogprobs, prompt_logprobs
from jaxengine.engine.sampler import argmax
from jaxengine.models.decoder import LayerCaches
from jaxengine.weights import ParamSpec, merge_params


def make_forward(
    shape: StepShape,
    *,
    definition: Any,
    specs: dict[str, ParamSpec],
    mesh: Mesh,
    block_size: int,
    num_layers: int,
    returns_hidden: bool = False,
) -> Callable:
    """Return the jitted forward step of one shape.

    It maps (params, caches, tables, last_tokens, packed) to (caches, tables, logits [B, V],
    sample_slots [B]) and, with ``returns_hidden``, the last layer's output [T, D].
    """

    def forward(
        params: dict[str, jax.Array],
        caches: LayerCaches,
        tables: Int[Array, "S W"],
        last_tokens: Int[Array, " S"],
        packed: Int[Array, " P"],
    ) -> tuple:
        parts = split_packed(shape, packed)
        tables = update_tables(
            tables, parts["table_rows"], parts["table_columns"], parts["table_blocks"]
        )
        batch = build_input_batch(shape, parts, tables, last_tokens, block_size)
        model = merge_params(definition, params)
        hidden, caches = model(batch, caches)
        chosen = hidden if shape.decode_only else hidden[batch.logits_indices]
        logits = model.compute_logits(chosen)
        never = last_tokens.shape[0]  # past the end: the sampled token is dropped
        sample_slots = jnp.where(parts["samples_token"] > 0, parts["slots"], never)
        outputs = (caches, tables, logits, sample_slots)
        return (*outputs, hidden) if returns_hidden else outputs

    param_specs = {path: spec.spec for path, spec in specs.items()}
    cache_specs = [(CACHE_SPEC, CACHE_SPEC)] * num_layers
    outputs = (cache_specs, P(), P(), P(), *([P()] if returns_hidden else []))
    sharded = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(param_specs, cache_specs, P(), P(), P()),
        out_specs=outputs,
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )
    return jax.jit(sharded, donate_argnums=(1, 2))


def make_prompt_scorer(
    num_logprobs: int, *, definition: Any, specs: dict[str, ParamSpec], mesh: Mesh
) -> Callable:
    """Return a jitted function that scores prompts: (params, hidden [T, D], next ids [T])."""

    def score(
        params: dict[str, jax.Array], hidden: Float[Array, "T D"], next_ids: Int[Array, " T"]
    ) -> TokenLogprobs:
        model = merge_params(definition, params)
        return prompt_logprobs(hidden, next_ids, model.compute_logits, num_logprobs)

    param_specs = {path: spec.spec for path, spec in specs.items()}
    return jax.jit(
        jax.shard_map(
            score, mesh=mesh, in_specs=(param_specs, P(), P()), out_specs=P(), check_vma=False
        )
    )


@functools.partial(jax.jit, donate_argnums=1)
def sample_greedy(
    logits: Float[Array, "B V"], last_tokens: Int[Array, " S"], sample_slots: Int[Array, " B"]
) -> tuple[Int[Array, " S"], Int[Array, " B"]]:
    """Take the most likely token of each row (the lowest id of equals) and remember it."""
    token_ids = argmax(logits)
    return last_tokens.at[sample_slots].set(token_ids, mode="drop"), token_ids


@functools.partial(jax.jit, donate_argnums=0)
def apply_table_updates(tables: Int[Array, "S W"], updates: Int[Array, "3 n"]) -> Int[Array, "S W"]:
    """Store block ids that did not fit into a step's packed vector."""
    return update_tables(tables, *updates)
