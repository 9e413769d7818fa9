"""Rotary position embeddings: frequencies of every HF rope type, and the angles of a step.

Sources: RoPE arXiv:2104.09864; linear and dynamic (NTK-aware) scaling as HF defines them; YaRN
arXiv:2309.00071, section 3; llama3 as published with Llama 3.1; longrope arXiv:2402.13753.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.convert.model_spec import RopeSpec


def rope_frequencies(rope: RopeSpec, max_model_len: int) -> tuple[np.ndarray, float]:
    """Return the angles per position and the factor on cos and sin.

    Args:
        rope: The layer's rotary embedding.
        max_model_len: Longest sequence the engine serves. dynamic and longrope choose for this one
            length: keys already in the cache cannot be rotated again as a sequence grows.

    Returns:
        float32 [rotary_dim / 2] radians per position, and the attention factor (1 but for yarn and
        longrope).

    Raises:
        ValueError: If the rope type is unknown, or a list of factors has the wrong length.
    """
    dim = rope.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    if rope.rope_type == "default":
        return _inverse(rope.theta, exponents), 1.0
    if rope.rope_type == "linear":
        return _inverse(rope.theta, exponents) / np.float32(rope.get("factor")), 1.0
    if rope.rope_type == "dynamic":
        factor, length = rope.get("factor"), rope.original_length
        stretch = factor * max(max_model_len, length) / length - (factor - 1)
        return _inverse(rope.theta * stretch ** (dim / (dim - 2)), exponents), 1.0
    if rope.rope_type == "llama3":
        return _llama3(_inverse(rope.theta, exponents), rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, exponents)
    if rope.rope_type == "longrope":
        return _longrope(rope, exponents, max_model_len)
    raise ValueError(f"rope_type {rope.rope_type!r} is not supported")


def _inverse(theta: float, exponents: np.ndarray) -> np.ndarray:
    return (1.0 / theta**exponents).astype(np.float32)


def _llama3(inverse: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Keep short wavelengths, divide long ones by ``factor``, interpolate between."""
    wavelength = 2 * np.pi / inverse
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    smooth = np.clip((rope.original_length / wavelength - low) / (high - low), 0.0, 1.0)
    scaled = (1 - smooth) * inverse / rope.get("factor") + smooth * inverse
    return scaled.astype(np.float32)


def _yarn(rope: RopeSpec, exponents: np.ndarray) -> tuple[np.ndarray, float]:
    dim, factor, original = rope.rotary_dim, rope.get("factor"), rope.original_length

    def dim_of_rotations(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dim_of_rotations(rope.get("beta_fast", 32))
    high = dim_of_rotations(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a slope
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    inverse = 1.0 / rope.theta**exponents
    mixed = inverse / factor * ramp + inverse * (1 - ramp)
    return mixed.astype(np.float32), _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: RopeSpec, factor: float) -> float:
    def mscale(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(factor, rope.get("mscale")) / mscale(factor, rope.get("mscale_all_dim"))
    return mscale(factor)


def _longrope(
    rope: RopeSpec, exponents: np.ndarray, max_model_len: int
) -> tuple[np.ndarray, float]:
    """Divide each frequency by its own factor (LongRoPE, arXiv:2402.13753, section 3)."""
    original, factor = rope.original_length, rope.get("factor")
    factors = rope.get("long_factor" if max_model_len > original else "short_factor")
    if len(factors) != rope.rotary_dim // 2:
        raise ValueError(
            f"config.json has {len(factors)} longrope factors: one for each of "
            f"{rope.rotary_dim // 2} frequencies is needed"
        )
    inverse = 1.0 / (np.asarray(factors, np.float64) * rope.theta**exponents)
    # Phi 3.5 MoE names the factors on cos and sin too, for short sequences and for long ones.
    own = rope.get("long_mscale" if max_model_len > original else "short_mscale")
    attention_factor = rope.get("attention_factor", own)
    if attention_factor is None:
        growth = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + growth)
    return inverse.astype(np.float32), float(attention_factor)


def rope_cos_sin(
    positions: Int[Array, " T"], frequencies: np.ndarray, factor: float
) -> tuple[Float[Array, "T R"], Float[Array, "T R"]]:
    """Cosine and sine of every position's angles, float32 [T, rotary_dim / 2]."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "T *heads H"], cos_sin: tuple[Float[Array, "T R"], Float[Array, "T R"]]
) -> Float[Array, "T *heads H"]:
    """Turn the first 2R dimensions of each head, j together with j + R, in float32."""
    half = cos_sin[0].shape[-1]
    cos, sin = (a.reshape(a.shape[0], *(1,) * (x.ndim - 2), half) for a in cos_sin)
    x32 = x.astype(jnp.float32)
    first, second = x32[..., :half], x32[..., half : 2 * half]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)
