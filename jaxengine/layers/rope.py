"""Rotary position embeddings: frequencies of every HF rope type, and the angles of a step.

Sources: RoPE arXiv:2104.09864; linear and dynamic (NTK-aware) scaling as HF defines them; YaRN
arXiv:2309.00071, section 3; llama3 as published with Llama 3.1.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.config import RopeConfig

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, max_model_len: int
) -> tuple[np.ndarray, float]:
    """Return the angles per position and the factor on cos and sin.

    Args:
        rope: The model's rope settings.
        head_dim: H; ``rope.rotary_fraction`` of it is rotated.
        max_position_embeddings: The checkpoint's own length.
        max_model_len: Longest sequence the engine serves. The dynamic type scales its base for
            this one length: keys already in the cache cannot be rotated again as a sequence grows.

    Returns:
        float32 [rotary_dim / 2] radians per position, and the attention factor (1 but for yarn).

    Raises:
        ValueError: If the rope type is unknown.
    """
    dim = int(head_dim * rope.rotary_fraction)
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    p = rope.parameters
    if rope.rope_type == "default":
        return _inverse(rope.theta, exponents), 1.0
    if rope.rope_type == "linear":
        return _inverse(rope.theta, exponents) / np.float32(p["factor"]), 1.0
    if rope.rope_type == "dynamic":
        length = p.get("original_max_position_embeddings") or max_position_embeddings
        stretch = p["factor"] * max(max_model_len, length) / length - (p["factor"] - 1)
        return _inverse(rope.theta * stretch ** (dim / (dim - 2)), exponents), 1.0
    if rope.rope_type == "llama3":
        return _llama3(_inverse(rope.theta, exponents), p), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, dim, exponents, max_position_embeddings)
    raise ValueError(f"rope_type {rope.rope_type!r} is not supported: use one of {ROPE_TYPES}")


def _inverse(theta: float, exponents: np.ndarray) -> np.ndarray:
    return (1.0 / theta**exponents).astype(np.float32)


def _llama3(inverse: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """Keep short wavelengths, divide long ones by ``factor``, interpolate between."""
    wavelength = 2 * np.pi / inverse
    original = p["original_max_position_embeddings"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    scaled = (1 - smooth) * inverse / p["factor"] + smooth * inverse
    return scaled.astype(np.float32)


def _yarn(
    rope: RopeConfig, dim: int, exponents: np.ndarray, max_position_embeddings: int
) -> tuple[np.ndarray, float]:
    p = rope.parameters
    original = p.get("original_max_position_embeddings") or max_position_embeddings
    factor = p["factor"]

    def dim_of_rotations(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dim_of_rotations(p.get("beta_fast") or 32)
    high = dim_of_rotations(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a slope
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    inverse = 1.0 / rope.theta**exponents
    mixed = inverse / factor * ramp + inverse * (1 - ramp)
    return mixed.astype(np.float32), _yarn_attention_factor(p, factor)


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    def mscale(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(factor, p["mscale"]) / mscale(factor, p["mscale_all_dim"])
    return mscale(factor)


def rope_cos_sin(
    positions: Int[Array, " T"], frequencies: np.ndarray, factor: float
) -> tuple[Float[Array, "T R"], Float[Array, "T R"]]:
    """Cosine and sine of every position's angles, float32 [T, rotary_dim / 2]."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
