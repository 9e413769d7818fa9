"""The rotary embedding of a GGUF file, as a config.json says it.

A file names a type and a factor, or has a tensor with a divisor for each frequency, or both; and
llama.cpp multiplies cosine and sine by a factor for any type. What transformers has a type for gets
that type. The rest becomes transformers' longrope with both its lists alike, which divides each
frequency by a number of its own, so that nothing a file can say is lost.
Source of the meaning and of the defaults: llama.cpp, src/llama-model.cpp and src/llama-context.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import Keys
from jaxengine.convert.errors import CheckpointError
from jaxengine.convert.gguf_file import GGUFFile
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.tensors import read

Rope = Keys.Rope
FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
# Not parameters of the model: they become part of its config.
ROPE_TENSORS = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)

OLD_LINEAR_FACTOR = "{arch}.rope.scale_linear"
TYPES = ("none", "linear", "yarn", "longrope")
DEFAULT_BASE = 10000.0


def rope_config(file: GGUFFile, metadata: Metadata, head_dim: int) -> dict[str, Any]:
    """The fields of config.json about the rotary embedding.

    Args:
        file: The file, for its tensors of frequency factors.
        metadata: Its keys.
        head_dim: H.

    Raises:
        CheckpointError: If a value makes no sense, or the type is not known.
    """
    rotary_dim = metadata.integer(Rope.DIMENSION_COUNT, head_dim, low=2, high=head_dim)
    base = metadata.number(Rope.FREQ_BASE, DEFAULT_BASE) or DEFAULT_BASE
    if alpha := metadata.number(Rope.SCALING_ALPHA, 0.0):
        base *= alpha ** (rotary_dim / max(rotary_dim - 2, 1))
    config = {"rope_theta": base, "rope_scaling": _scaling(file, metadata, rotary_dim, base)}
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config


def _scaling(
    file: GGUFFile, metadata: Metadata, rotary_dim: int, base: float
) -> dict[str, Any] | None:
    kind = metadata.text(Rope.SCALING_TYPE, "linear")
    if kind not in TYPES:
        raise CheckpointError(
            f"{file.path}: {metadata.key(Rope.SCALING_TYPE)} is {kind!r}, known: {', '.join(TYPES)}"
        )
    factor = _factor(metadata) if kind != "none" else 1.0
    attention_factor = metadata.number(Rope.SCALING_ATTN_FACTOR, 1.0)
    if kind == "yarn" and factor != 1.0:
        return _yarn(file, metadata, factor, attention_factor)
    if found := _lists(file, rotary_dim):
        short, long = found
        if factor == attention_factor == 1.0 and (short == 1.0).all() and (long == 1.0).all():
            return None
        if kind != "longrope" and factor == attention_factor == 1.0 and short is long:
            known = _llama3(short, rotary_dim, base)
            if known is not None:
                return known
        return _longrope(metadata, short * factor, long * factor, attention_factor)
    if attention_factor != 1.0:
        factors = np.full(rotary_dim // 2, factor)
        return _longrope(metadata, factors, factors, attention_factor)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _factor(metadata: Metadata) -> float:
    for key in (Rope.SCALING_FACTOR, OLD_LINEAR_FACTOR):
        factor = metadata.number(key, None)
        if factor is not None:
            return float(factor) or 1.0  # 0 says that there is none
    return 1.0


def _original_length(metadata: Metadata) -> int:
    length = metadata.integer(Keys.LLM.CONTEXT_LENGTH, low=1)
    return int(metadata.integer(Rope.SCALING_ORIG_CTX_LEN, length) or length)


def _yarn(
    file: GGUFFile, metadata: Metadata, factor: float, attention_factor: float
) -> dict[str, Any]:
    if any(name in file.tensors for name in ROPE_TENSORS):
        raise CheckpointError(f"{file.path} has both yarn and {FREQUENCY_FACTORS}: not supported")
    attention_factor *= metadata.number(Rope.SCALING_YARN_ATTN_FACTOR, 1.0)
    mix = metadata.number(Rope.SCALING_YARN_EXT_FACTOR, 1.0, low=-1.0)
    if mix == 0.0:
        scaling: dict[str, Any] = {"rope_type": "linear", "factor": factor}
        return scaling if attention_factor == 1.0 else _refuse_mix(metadata, mix)
    if mix not in (1.0, -1.0):  # -1 asks for the type's own, which is 1
        return _refuse_mix(metadata, mix)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_length(metadata),
        "beta_fast": metadata.number(Rope.SCALING_YARN_BETA_FAST, 32.0) or 32.0,
        "beta_slow": metadata.number(Rope.SCALING_YARN_BETA_SLOW, 1.0) or 1.0,
    }
    multiplier = metadata.number(Rope.SCALING_YARN_LOG_MUL, 0.0)
    if multiplier or attention_factor != 1.0:
        divisor = _yarn_scale(factor, multiplier) if multiplier else 1.0
        scaling["attention_factor"] = attention_factor * _yarn_scale(factor, 1.0) / divisor
    return scaling


def _yarn_scale(factor: float, weight: float) -> float:
    """Equation 22 of arXiv:2309.00071, with a weight on its logarithm."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _refuse_mix(metadata: Metadata, mix: float) -> dict[str, Any]:
    raise CheckpointError(
        f"{metadata.path}: {metadata.key(Rope.SCALING_YARN_EXT_FACTOR)} is {mix}: only 1 is "
        "supported, and 0 without an attention factor"
    )


def _lists(file: GGUFFile, rotary_dim: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Divisors of the frequencies for short and for long contexts; None where there are none."""
    names = [name for name in ROPE_TENSORS if name in file.tensors]
    if not names:
        return None
    if names == [FREQUENCY_FACTORS]:
        factors = _factors(file, FREQUENCY_FACTORS, rotary_dim)
        return factors, factors
    if names != [LONG_FACTORS, SHORT_FACTORS]:
        raise CheckpointError(
            f"{file.path} has {', '.join(names)}: either {FREQUENCY_FACTORS} alone is needed, or "
            f"{SHORT_FACTORS} and {LONG_FACTORS}"
        )
    return _factors(file, SHORT_FACTORS, rotary_dim), _factors(file, LONG_FACTORS, rotary_dim)


def _factors(file: GGUFFile, name: str, rotary_dim: int) -> np.ndarray:
    tensor = file.tensors[name]
    if tensor.shape != (rotary_dim // 2,):
        raise CheckpointError(
            f"{file.path}: {name} has shape {tensor.shape}, expected ({rotary_dim // 2},) for "
            f"{rotary_dim} rotated dimensions"
        )
    factors = read(tensor).astype(np.float64)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise CheckpointError(f"{file.path}: {name} holds a factor that is no positive number")
    return factors


def _longrope(
    metadata: Metadata, short: np.ndarray, long: np.ndarray, attention_factor: float
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": _original_length(metadata),
        "attention_factor": attention_factor,
    }


def _llama3(found: np.ndarray, rotary_dim: int, base: float) -> dict[str, Any] | None:
    """Llama 3.1's scaling, if its parameters give these factors; else None.

    The file has only the result; the parameters are those of every Llama from 3.1 on. Source of
    the formula: transformers, modeling_rope_utils.py.
    """
    factor, low, high, original = round(float(found.max()), 3), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * base ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factor == 1.0 or not np.allclose(found, expected, rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
