"""Random numbers of a request: a pure function of its seed, position and token id.

Nothing here depends on the batch, the row or the number of tokens asked for, so a request
samples the same tokens whoever it shares the device with.

Seed and position make a key with threefry (``jax.random``). The number for a token is a
keyed hash of its id: threefry over [B, V] took ten times as long on a CPU as this.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

TOKEN_STRIDE = 0x9E3779B1  # odd, 2**32 / golden ratio: spreads neighbouring ids


def stream_keys(
    seed_high: Int[Array, " B"], seed_low: Int[Array, " B"], position: Int[Array, " B"]
) -> UInt[Array, "B 2"]:
    """Return two key words for each row, from the bits of its seed and its position."""
    words = jnp.stack([seed_high, seed_low], axis=1).view(jnp.uint32)
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, position))


def gumbel_noise(keys: UInt[Array, "B 2"], token_ids: UInt[Array, "B V"]) -> Float[Array, "B V"]:
    """Return standard Gumbel noise, float32, finite, for the given token ids.

    argmax(log p + noise) is a sample of p. Large values of the noise decide, so the
    uniform number u is small there and keeps all its bits: noise = -log(-log(1 - u)).
    """
    bits = _mix(token_ids * jnp.uint32(TOKEN_STRIDE) + keys[:, :1])
    bits = _mix(bits ^ keys[:, 1:])
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    u = jnp.minimum(u, 1.0 - 2.0**-24)
    # -log(1 - u) loses bits near 0, where four terms of its series are exact to 1e-8.
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    exponential = jnp.where(u < 2.0**-6, series, -jnp.log(1.0 - u))
    return -jnp.log(exponential)


def _mix(x: UInt[Array, "B V"]) -> UInt[Array, "B V"]:
    """Finalizer of MurmurHash3 (A. Appleby, public domain): every input bit moves all others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
