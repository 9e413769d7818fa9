"""The most likely tokens, where each shard has the logits of a part of the vocabulary."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.pallas_kernels.all_reduce import all_gather
from jaxengine.pallas_kernels.peers import Peers
from jaxengine.sharding import TENSOR_AXIS


def argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return the column of each row's largest value, the lowest one among equals.

    First the maximum, then where it is: two plain reductions, which vectorise on a CPU (7 times
    as fast as ``jnp.argmax``) and which a GPU spreads over many blocks even for a single row.
    """
    columns = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    is_largest = x == jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_largest, columns, x.shape[1] - 1), axis=1)


def argmax_over_shards(x: Float[Array, "B local_V"], peers: Peers | None) -> Int[Array, " B"]:
    """Return the token with each row's largest logit, the lowest one among equals.

    Args:
        x: Logits of this shard's part of the vocabulary, under ``shard_map``.
        peers: How the shards talk to each other; None for XLA's way.
    """
    token_ids = argmax(x)
    num_shards, width = lax.axis_size(TENSOR_AXIS), x.shape[1]
    if num_shards == 1:
        return token_ids
    largest = jnp.max(x, axis=1).astype(jnp.float32)
    token_ids += lax.axis_index(TENSOR_AXIS) * width
    pair = jnp.stack([lax.bitcast_convert_type(largest, jnp.int32), token_ids], axis=1)
    pairs = all_gather(pair, peers, axis_name=TENSOR_AXIS)  # [N, B, 2]
    values = lax.bitcast_convert_type(pairs[:, :, 0], jnp.float32)
    is_largest = values == jnp.max(values, axis=0)
    # As in ``argmax``, a row of NaN gives the last token and not one outside of the vocabulary.
    return jnp.min(jnp.where(is_largest, pairs[:, :, 1], num_shards * width - 1), axis=0)
