"""From token ids to the residual stream, and from it to scores over the vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.convert.model_spec import EmbeddingSpec
from jaxengine.layers.linear import Linear
from jaxengine.layers.norm import Norm
from jaxengine.layers.parameter import parameter
from jaxengine.pallas_kernels.all_reduce import all_reduce
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.pallas_kernels.split_product import project
from jaxengine.sharding import TENSOR_AXIS


class VocabEmbedding(nnx.Module):
    """A row for each token, the vocabulary cut over the shards; also an output projection.

    With ``input_major`` it is held as the projection likes it, [D, V]; the few columns that a
    step looks up cost little.
    """

    num_sums = 1  # over the shards, of a look-up

    def __init__(
        self, vocab_size: int, size: int, *, dtype: Any, input_major: bool = False
    ) -> None:
        self.input_major = input_major
        if input_major:
            shape, spec = (size, vocab_size), P(None, TENSOR_AXIS)
        else:
            shape, spec = (vocab_size, size), P(TENSOR_AXIS, None)
        self.weight = parameter(shape, dtype, spec, num_in_axes=int(input_major))

    def __call__(
        self, token_ids: Int[Array, " T"], peers: Peers | None = None
    ) -> Float[Array, "T D"]:
        """Look up rows; ``peers`` is how the shards' are put together, None for XLA's way."""
        weight = self.weight[...]
        num_rows = weight.shape[1 if self.input_major else 0]
        local = token_ids - jax.lax.axis_index(TENSOR_AXIS) * num_rows
        is_here = (local >= 0) & (local < num_rows)
        row = jnp.where(is_here, local, 0)
        rows = weight[:, row].T if self.input_major else weight[row]
        found = jnp.where(is_here[:, None], rows, 0)
        return all_reduce(found, peers, axis_name=TENSOR_AXIS)

    def logits(self, x: Float[Array, "B D"]) -> Float[Array, "B local_V"]:
        """Scores of this shard's part of the vocabulary."""
        weight = self.weight[...]
        return x @ weight if self.input_major else project(x, weight)


class VocabBias(nnx.Module):
    """A bias on the scores, cut as they are."""

    def __init__(self, vocab_size: int, *, dtype: Any) -> None:
        self.bias = parameter((vocab_size,), dtype, P(TENSOR_AXIS), init="zeros")


class PositionEmbedding(nnx.Module):
    """A learned row for each position.

    Args:
        spec: How many there are, and which is the first.
        hidden_size: D.
        dtype: Type of the rows.
    """

    def __init__(self, spec: EmbeddingSpec, hidden_size: int, *, dtype: Any) -> None:
        self.offset = spec.position_offset
        shape = (spec.num_positions + spec.position_offset, hidden_size)
        self.weight = parameter(shape, dtype, P(None, None))

    def __call__(self, positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        return jnp.take(self.weight[...], positions + self.offset, axis=0, mode="clip")


def embed(
    token_ids: Int[Array, " T"],
    positions: Int[Array, " T"],
    peers: Peers | None,
    *,
    scale: float,
    tokens: VocabEmbedding,
    projection: Linear | None,
    learned_positions: PositionEmbedding | None,
    norm: Norm | None,
) -> Float[Array, "T D"]:
    """The residual stream of some tokens before the first layer.

    Args:
        token_ids: Of the step.
        positions: Theirs in their sequences.
        peers: How the shards add up; None for XLA's way.
        scale: Factor on a token's embedding, rounded to its type first, as Gemma's is.
        tokens: The token embedding.
        projection: Of a token's embedding to the width of the stream; None for none.
        learned_positions: Added to it; None for none.
        norm: Of the sum; None for none.
    """
    x = tokens(token_ids, peers)
    if scale != 1:
        x = x * jnp.asarray(scale, x.dtype)
    if projection is not None:
        x = projection(x)
    if learned_positions is not None:
        x = x + learned_positions(positions)
    return x if norm is None else norm(x)
