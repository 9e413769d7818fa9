"""The k best of a vocabulary in one pass over it.

The k largest values of a row lie in the k blocks with the largest maxima, so only those
blocks are sorted. (``lax.top_k`` over the whole row is a full sort on a GPU as soon as k
passes 16.)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def top_tokens(x: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Return the k largest values of each row and their columns, lower column first if equal.

    Args:
        x: float32 values.
        k: At least 1, at most V; meant for k far below V.
    """
    B, V = x.shape
    x = jnp.where(x == 0.0, 0.0, x)  # top_k would put 0.0 before -0.0
    # Two sorts follow, of V / width maxima and of k * width candidates: keep both short.
    width = 128 if k <= 32 else 64
    num_blocks = -(-V // width)
    if num_blocks <= 2 * k:
        values, ids = lax.top_k(x, k)
        return values, ids.astype(jnp.int32)
    x = jnp.pad(x, ((0, 0), (0, num_blocks * width - V)), constant_values=-jnp.inf)
    blocks = x.reshape(B, num_blocks, width)
    _, chosen = lax.top_k(jnp.max(blocks, axis=2), k)
    chosen = jnp.sort(chosen, axis=1)  # in the order of the ids, for ties
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(B, -1)
    values, index = lax.top_k(candidates, k)
    block = jnp.take_along_axis(chosen, index // width, axis=1)
    return values, (block * width + index % width).astype(jnp.int32)
