"""The jitted programs of a step: forward with greedy sampling, prompt scores, table updates.

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

TRITON_GEMM_MAX_TOKENS = 32


def make_forward(
    shape: StepShape,
    *,
    definition: Any,
    specs: dict[str, ParamSpec],
    mesh: Mesh,
    block_size: int,
    num_layers: int,
    returns_hidden: bool = False,
) -> Any:
    """Return the jitted forward step of one shape.

    It maps (params, caches, tables, last_tokens, packed) to (caches, tables, last_tokens,
    token_ids [B], logits [B, V]) and, with ``returns_hidden``, the last layer's output [T, D].
    The token ids are the greedy ones, and ``last_tokens`` takes them over if the step is greedy:
    one program a step in the most common case.
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
        token_ids = argmax(logits)
        never = last_tokens.shape[0]  # past the end: not stored
        is_stored = (parts["samples_token"] > 0) & (parts["is_greedy"][0] > 0)
        targets = jnp.where(is_stored, parts["slots"], never)
        last_tokens = last_tokens.at[targets].set(token_ids, mode="drop")
        outputs = (caches, tables, last_tokens, token_ids, logits)
        return (*outputs, hidden) if returns_hidden else outputs

    param_specs = {path: spec.spec for path, spec in specs.items()}
    cache_specs = [(CACHE_SPEC, CACHE_SPEC)] * num_layers
    outputs = (cache_specs, P(), P(), P(), P(), *([P()] if returns_hidden else []))
    sharded = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(param_specs, cache_specs, P(), P(), P()),
        out_specs=outputs,
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )
    return jax.jit(sharded, donate_argnums=(1, 2, 3))


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


def compiler_options(shape: StepShape, platform: str) -> dict[str, bool]:
    """XLA options for a shape.

    With more than a few rows cuBLASLt's products are as fast as the ones XLA writes in Triton, and
    the search among them takes 2.6 s instead of 4.2 s a program. With few rows Triton's are 4 to
    8 % faster (measured with Llama-3.1-8B, benchmarks/LOG.md).
    """
    if platform != "gpu" or shape.num_tokens <= TRITON_GEMM_MAX_TOKENS:
        return {}
    return {"xla_gpu_enable_triton_gemm": False}


@functools.partial(jax.jit, donate_argnums=0)
def apply_table_updates(tables: Int[Array, "S W"], updates: Int[Array, "3 n"]) -> Int[Array, "S W"]:
    """Store block ids that did not fit into a step's packed vector."""
    return update_tables(tables, *updates)
