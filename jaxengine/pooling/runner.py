"""Runs an encoder over packed sequences, in steps of a few padded sizes.

On a CPU the pooled vector of a sequence does not depend on where in a step it stands or on what
stands beside it; XLA's products may still round otherwise in a step of another padded size, by
about 1e-7 of a vector of length 1.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxengine.models.encoder import Encoder, PackedBatch
from jaxengine.sharding import make_mesh
from jaxengine.weights import Params, merge_params

Output = Literal["cls", "mean", "last", "max", "labels", "tokens"]
MIN_TOKENS, MIN_ROWS = 16, 8  # of a step: what is shorter is padded


class TokenSequence(NamedTuple):
    """A sequence of the model.

    Attributes:
        token_ids: What it reads; one at least.
        token_types: Which part of a pair each token belongs to.
    """

    token_ids: Sequence[int]
    token_types: Sequence[int]


class EncoderRunner:
    """An encoder on one device.

    Args:
        definition: Of the model, from ``param_specs``.
        param_specs: How each parameter is cut.
        params: The parameters.
        device: Where they are.
        max_num_batched_tokens: Most tokens of a step; a sequence has no more.
        max_num_seqs: Most sequences of a step.
    """

    def __init__(
        self,
        definition: Any,
        param_specs: dict[str, P],
        params: Params,
        device: jax.Device,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self._definition, self._param_specs, self._params = definition, param_specs, params
        self._mesh = make_mesh([device])
        self._budget, self._max_num_seqs = max_num_batched_tokens, max_num_seqs
        self._programs: dict[Output, Any] = {}
        self._lock = threading.Lock()

    def run(self, sequences: Sequence[TokenSequence], output: Output) -> Iterator[np.ndarray]:
        """Give what is made of each sequence, in their order.

        Args:
            sequences: Any number.
            output: A pooling of its tokens [D]; "labels": the scores [labels]; "tokens": the last
                layer's output [tokens, D]. All in float32.
        """
        before: tuple[list[TokenSequence], Array] | None = None
        for step in self._steps(sequences):
            with self._lock:
                found = self._dispatch(step, output)
            # The host reads a step while the device computes the next.
            if before is not None:
                yield from self._rows(*before, output)
            before = step, found
        if before is not None:
            yield from self._rows(*before, output)

    def _steps(self, sequences: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
        step: list[TokenSequence] = []
        num_tokens = 0
        for each in sequences:
            length = len(each.token_ids)
            if step and (num_tokens + length > self._budget or len(step) == self._max_num_seqs):
                yield step
                step, num_tokens = [], 0
            step.append(each)
            num_tokens += length
        if step:
            yield step

    def _dispatch(self, step: list[TokenSequence], output: Output) -> Array:
        lengths = [len(each.token_ids) for each in step]
        num_tokens = padded(sum(lengths), MIN_TOKENS)
        num_rows = padded(len(step), MIN_ROWS)
        tokens = np.zeros((3, num_tokens), np.int32)  # ids, positions, types
        ends = np.cumsum(lengths)
        for each, end, length in zip(step, ends, lengths, strict=True):
            tokens[:, end - length : end] = each.token_ids, range(length), each.token_types
        starts = np.full(num_rows + 1, ends[-1], np.int32)
        starts[0], starts[1 : len(step) + 1] = 0, ends
        if output not in self._programs:
            self._programs[output] = self._program(output)
        batch = PackedBatch(*map(jnp.asarray, (*tokens, starts)))
        found: Array = self._programs[output](self._params, batch)
        return found

    def _program(self, output: Output) -> Any:
        def compute(params: Params, batch: PackedBatch) -> Array:
            model = merge_params(self._definition, params)
            return outputs_of(model, batch, output)

        sharded = jax.shard_map(
            compute,
            mesh=self._mesh,
            in_specs=(self._param_specs, P()),
            out_specs=P(),
            check_vma=False,  # kernels do not say how their outputs vary over the mesh
        )
        return jax.jit(sharded)

    @staticmethod
    def _rows(step: list[TokenSequence], found: Array, output: Output) -> Iterator[np.ndarray]:
        values = np.asarray(found)
        if output != "tokens":
            yield from values[: len(step)]
            return
        start = 0
        for each in step:
            yield values[start : start + len(each.token_ids)]
            start += len(each.token_ids)


def outputs_of(model: Encoder, batch: PackedBatch, output: Output) -> Float[Array, "rows size"]:
    """Run the model and pool, in float32; rows of padding hold anything."""
    hidden = model(batch)
    starts, ends = batch.query_start_loc[:-1], batch.query_start_loc[1:]
    if output == "labels":
        assert model.labels is not None, "the model scores no sequences"
        return model.labels(hidden[starts]).astype(jnp.float32)
    hidden = hidden.astype(jnp.float32)
    if output == "tokens":
        return hidden
    if output == "cls":
        return hidden[starts]
    if output == "last":
        return hidden[jnp.maximum(ends - 1, 0)]
    num_rows = len(starts)
    # Tokens of padding get the number of a row that there is not, and are dropped.
    row = jnp.searchsorted(ends, jnp.arange(len(hidden)), side="right")
    if output == "max":
        return jax.ops.segment_max(hidden, row, num_rows)
    return jax.ops.segment_sum(hidden, row, num_rows) / jnp.maximum(ends - starts, 1)[:, None]


def padded(count: int, least: int) -> int:
    """The next power of two, ``least`` at least."""
    return max(least, 1 << (count - 1).bit_length())
