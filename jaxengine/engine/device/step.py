"""The jitted programs of a step: a stage's forward, prompt scores, updates of tables and tokens.

Each is a pure function of device arrays and one packed vector from the host. Caches, tables and
last tokens are donated: they are updated in place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.batch import StepShape, build_input_batch, split_packed, update_tables
from jaxengine.engine.device.kv_cache import CACHE_SPEC
from jaxengine.engine.sampling.logprobs import TokenLogprobs, prompt_logprobs
from jaxengine.layers.vocabulary import argmax_over_shards
from jaxengine.models.decoder import LayerCaches
from jaxengine.pallas_kernels.peers import InboxLayout, Peers
from jaxengine.pallas_kernels.target import Target
from jaxengine.sharding import LOGITS_SPEC, TENSOR_AXIS
from jaxengine.weights import ParamSpec, merge_params

# Below, a last layer for the rows' last tokens alone would cost another set of products and kernels
# at compilation, and spare little: a step of so few tokens waits for the weights.
MIN_TOKENS_PER_ROW = 2


@dataclasses.dataclass(frozen=True)
class StageParts:
    """A pipeline stage's share of a model, taken apart. A model of one stage is both ends.

    Attributes:
        definition: From ``param_specs``.
        specs: Its parameters.
        mesh: The devices of its shards.
        layers: The layers it holds.
        is_first: Whether it starts from token ids.
        is_last: Whether it ends with logits.
    """

    definition: Any
    specs: dict[str, ParamSpec]
    mesh: Mesh
    layers: range
    is_first: bool = True
    is_last: bool = True

    @property
    def local_device(self) -> jax.Device:
        """One of its devices that this process can ask about; another host's are taken as alike."""
        here = jax.process_index()
        own = [device for device in self.mesh.devices.flat if device.process_index == here]
        return (own or jax.local_devices())[0]

    @property
    def platform(self) -> str:
        """Of its devices: "gpu" or "cpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def is_on_cpu(self) -> bool:
        """Whether its devices are CPUs."""
        return self.platform == "cpu"

    @property
    def is_on_hopper(self) -> bool:
        """Whether its devices are GPUs of the kind that most here was measured on."""
        return Target.of(self.mesh.devices.flat[0]).is_hopper


def make_forward(
    shape: StepShape,
    *,
    parts: StageParts,
    block_size: int,
    returns_hidden: bool = False,
    overwrites_outputs: bool = False,
    inbox_layout: InboxLayout | None = None,
) -> Any:
    """Return the jitted forward step of one shape through one stage.

    It maps (weights, caches, tables, last_tokens, packed) and, but for the first stage, the output
    [T, D] of the stage before, to (caches, tables, last_tokens) and what the next one needs: the
    output [T, D] of its layers, or after the last stage token_ids [B], logits [B, V] (cut over the
    vocabulary) and, with ``returns_hidden``, that output too. Without it the last layer serves the
    rows' last tokens alone, where they are few. The token ids are the greedy ones, and
    ``last_tokens`` takes them over if the step is greedy: one program a step in the most common
    case.

    With ``inbox_layout`` it also takes the addresses of such inboxes on all shards, and adds up
    over the shards by writing there. With ``overwrites_outputs`` the last stage takes two more
    arrays at the end, whose memory (not their values) it uses for token ids and logits.

    The weights come as a tuple, in the order of ``parts.specs``: jax would sort a dict's keys in
    every step, which is an eighth of the time that it takes to call a model of 226 weights.
    """
    last_tokens_only = (
        parts.is_last
        and not returns_hidden
        and shape.num_rows * MIN_TOKENS_PER_ROW <= shape.num_tokens
    )

    def forward(
        weights: tuple[jax.Array, ...],
        caches: LayerCaches,
        tables: Int[Array, "S W"],
        last_tokens: Int[Array, " S"],
        packed: Int[Array, " P"],
        *others: Array,  # hidden [T, D] of the stage before; addresses; outputs to overwrite
    ) -> tuple:
        incoming = others[: not parts.is_first]
        inputs = split_packed(shape, packed)
        tables = update_tables(
            tables, inputs["table_rows"], inputs["table_columns"], inputs["table_blocks"]
        )
        model = merge_params(parts.definition, dict(zip(parts.specs, weights, strict=True)))
        peers = None
        if inbox_layout is not None:
            rank = jax.lax.axis_index(TENSOR_AXIS)
            num_calls = model.num_sums + parts.is_last  # and the most likely tokens
            origin = jnp.stack([rank, inputs["step_number"][0] * num_calls])
            peers = Peers(others[len(incoming)], origin, np.int32(0), inbox_layout)
        batch = build_input_batch(
            shape,
            inputs,
            tables,
            last_tokens,
            block_size,
            last_tokens_only=last_tokens_only,
            peers=peers,
        )
        hidden, caches = model(batch, caches, *incoming)
        if not parts.is_last:
            return caches, tables, last_tokens, hidden
        # Asked for the last tokens only, a model may leave out the others, or not.
        is_chosen = last_tokens_only and hidden.shape[0] == shape.num_rows
        chosen = hidden if shape.decode_only or is_chosen else hidden[batch.logits_indices]
        logits = model.compute_logits(chosen)
        token_ids = argmax_over_shards(logits, batch.after_sums(model.num_sums).peers)
        never = last_tokens.shape[0]  # past the end: not stored
        is_stored = (inputs["samples_token"] > 0) & (inputs["is_greedy"][0] > 0)
        targets = jnp.where(is_stored, inputs["slots"], never)
        last_tokens = last_tokens.at[targets].set(token_ids, mode="drop")
        outputs = (caches, tables, last_tokens, token_ids, logits)
        return (*outputs, hidden) if returns_hidden else outputs

    weight_specs = tuple(spec.spec for spec in parts.specs.values())
    cache_specs = CACHE_SPEC  # of every array in the list
    out_specs = [P(), LOGITS_SPEC, P()][: 2 + returns_hidden] if parts.is_last else [P()]
    first_overwritten = 5 + (not parts.is_first) + (inbox_layout is not None)
    other_specs = [P()] * (first_overwritten - 5) + [P(), LOGITS_SPEC][: 2 * overwrites_outputs]
    sharded = jax.shard_map(
        forward,
        mesh=parts.mesh,
        in_specs=(weight_specs, cache_specs, P(), P(), P(), *other_specs),
        out_specs=(cache_specs, P(), P(), *out_specs),
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )
    overwritten = (first_overwritten, first_overwritten + 1) if overwrites_outputs else ()
    return jax.jit(sharded, donate_argnums=(1, 2, 3, *overwritten), keep_unused=overwrites_outputs)


def make_prompt_scorer(num_logprobs: int, *, parts: StageParts) -> Callable:
    """Return a jitted function that scores prompts: (params, hidden [T, D], next ids [T]).

    Args:
        num_logprobs: How many of the most likely tokens to return.
        parts: The last stage.
    """

    def score(
        params: dict[str, jax.Array], hidden: Float[Array, "T D"], next_ids: Int[Array, " T"]
    ) -> TokenLogprobs:
        model = merge_params(parts.definition, params)

        def compute_logits(hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
            local = model.compute_logits(hidden)
            return jax.lax.all_gather(local, TENSOR_AXIS, axis=1, tiled=True)

        return prompt_logprobs(hidden, next_ids, compute_logits, num_logprobs)

    param_specs = {path: spec.spec for path, spec in parts.specs.items()}
    return jax.jit(
        jax.shard_map(
            score,
            mesh=parts.mesh,
            in_specs=(param_specs, P(), P()),
            out_specs=P(),
            check_vma=False,
        )
    )


@functools.partial(jax.jit, donate_argnums=0)
def apply_table_updates(tables: Int[Array, "S W"], updates: Int[Array, "3 n"]) -> Int[Array, "S W"]:
    """Store block ids that did not fit into a step's packed vector."""
    return update_tables(tables, *updates)


@functools.partial(jax.jit, donate_argnums=0)
def store_tokens(
    last_tokens: Int[Array, " S"], targets: Int[Array, " B"], token_ids: Int[Array, " B"]
) -> Int[Array, " S"]:
    """Store sampled tokens by slot; a target past the end is dropped."""
    return last_tokens.at[targets].set(token_ids, mode="drop")
