"""The jitted programs of a step: a stage's forward, prompt scores, updates of tables and tokens.

Each is a pure function of device arrays and one packed vector from the host. Caches, tables and
last tokens are donated: they are updated in place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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


class StepState(NamedTuple):
    """What a stage keeps from step to step; donated to each, which returns the next one.

    As the two below it also holds how these arrays are cut, and their shapes before they exist.
    """

    caches: Any  # keys and values, a pair [num_blocks, K, block_size, H] for each cache array
    tables: Any  # [S, W] int32: block table of every slot; the last row is of padding, all zeros
    last_tokens: Any  # [slots] int32: newest sampled token of every slot


class StepArguments(NamedTuple):
    """What a stage is given for one step; None is nothing at all to jax."""

    packed: Any  # [P] int32, see ``StepShape.fields``
    hidden: Any = None  # [T, D] of the stage before; None for the first
    addresses: Any = None  # [N, 2] of the inboxes on all shards; None if XLA adds up over them


class ForwardOutputs(NamedTuple):
    """What a stage brings in one step."""

    token_ids: Any = None  # [B] int32, the most likely ones; None from all stages but the last
    logits: Any = None  # [B, V], cut over the vocabulary; likewise
    hidden: Any = None  # [T, D] of the layers: for the next stage, or to score prompts


# Token ids and logits of a past step, whose memory (not their values) a step uses for its own.
Overwritten = tuple[Int[Array, " B"], Float[Array, "B V"]]


def serves_last_tokens_only(shape: StepShape, parts: StageParts, *, returns_hidden: bool) -> bool:
    """Whether the model's last layer serves the rows' last tokens alone: where they are few."""
    are_few = shape.num_rows * MIN_TOKENS_PER_ROW <= shape.num_tokens
    return parts.is_last and not returns_hidden and are_few


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

    It maps (weights, StepState, StepArguments, Overwritten or None) to (StepState, ForwardOutputs).
    The token ids are the greedy ones, and ``last_tokens`` takes them over if the step is greedy:
    one program a step in the most common case. What is overwritten stands apart as jax donates an
    argument whole.

    All of them cross the border as plain tuples, the weights in the order of ``parts.specs``: a
    step of 226 weights takes jax an eighth longer to call if it has to sort a dict's keys, and 2 %
    longer for each tuple that has a name.

    Args:
        shape: Padded sizes.
        parts: The stage.
        block_size: Tokens a KV block holds.
        returns_hidden: Whether the last stage also returns its layers' output.
        overwrites_outputs: Whether it takes memory for token ids and logits.
        inbox_layout: Of the inboxes that it adds up in over the shards; None leaves that to XLA.
    """
    last_tokens_only = serves_last_tokens_only(shape, parts, returns_hidden=returns_hidden)

    def forward(
        weights: tuple[jax.Array, ...], state: tuple, arguments: tuple, _: Overwritten | None
    ) -> tuple[tuple, tuple]:
        new_state, outputs = run(weights, StepState(*state), StepArguments(*arguments))
        return tuple(new_state), tuple(outputs)

    def run(
        weights: tuple[jax.Array, ...], state: StepState, arguments: StepArguments
    ) -> tuple[StepState, ForwardOutputs]:
        inputs = split_packed(shape, arguments.packed)
        tables = update_tables(
            state.tables, inputs["table_rows"], inputs["table_columns"], inputs["table_blocks"]
        )
        model = merge_params(parts.definition, dict(zip(parts.specs, weights, strict=True)))
        batch = build_input_batch(
            shape,
            inputs,
            tables,
            state.last_tokens,
            block_size,
            last_tokens_only=last_tokens_only,
            peers=_first_sum(arguments, inputs, model.num_sums + parts.is_last, inbox_layout),
        )
        hidden, caches = model(batch, state.caches, arguments.hidden)
        if not parts.is_last:
            return StepState(caches, tables, state.last_tokens), ForwardOutputs(hidden=hidden)
        has_last_only = shape.decode_only or last_tokens_only
        logits = model.compute_logits(hidden if has_last_only else hidden[batch.logits_indices])
        token_ids = argmax_over_shards(logits, batch.after_sums(model.num_sums).peers)
        last_tokens = _store_if_greedy(state.last_tokens, inputs, token_ids)
        outputs = ForwardOutputs(token_ids, logits, hidden if returns_hidden else None)
        return StepState(caches, tables, last_tokens), outputs

    state_specs = StepState(CACHE_SPEC, P(), P())  # of every cache array
    output_specs = ForwardOutputs(
        P() if parts.is_last else None,
        LOGITS_SPEC if parts.is_last else None,
        P() if returns_hidden or not parts.is_last else None,
    )
    argument_specs = StepArguments(
        P(), None if parts.is_first else P(), None if inbox_layout is None else P()
    )
    sharded = jax.shard_map(
        forward,
        mesh=parts.mesh,
        in_specs=(
            tuple(spec.spec for spec in parts.specs.values()),
            tuple(state_specs),
            tuple(argument_specs),
            (P(), LOGITS_SPEC) if overwrites_outputs else None,
        ),
        out_specs=(tuple(state_specs), tuple(output_specs)),
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )
    return jax.jit(sharded, donate_argnums=(1, 3), keep_unused=overwrites_outputs)


def _first_sum(
    arguments: StepArguments,
    inputs: dict[str, Int[Array, " n"]],
    num_calls: int,
    inbox_layout: InboxLayout | None,
) -> Peers | None:
    """How the first of a step's ``num_calls`` exchanges between the shards goes; None: XLA's way.

    Each has a number that no exchange of another step has.
    """
    if inbox_layout is None:
        return None
    rank = jax.lax.axis_index(TENSOR_AXIS)
    origin = jnp.stack([rank, inputs["step_number"][0] * num_calls])
    return Peers(arguments.addresses, origin, np.int32(0), inbox_layout)


def _store_if_greedy(
    last_tokens: Int[Array, " slots"],
    inputs: dict[str, Int[Array, " n"]],
    token_ids: Int[Array, " B"],
) -> Int[Array, " slots"]:
    never = last_tokens.shape[0]  # past the end: not stored
    is_stored = (inputs["samples_token"] > 0) & (inputs["is_greedy"][0] > 0)
    targets = jnp.where(is_stored, inputs["slots"], never)
    return last_tokens.at[targets].set(token_ids, mode="drop")


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
