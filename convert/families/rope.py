"""The rotary embedding that a config.json asks for, in every spelling that is in use.

transformers 5 has ``rope_parameters`` (one object, or one for each kind of layer), earlier ones
``rope_scaling`` with ``type`` or ``rope_type`` and a ``rope_theta`` beside it; many families have
names of their own for the base and for the share of a head that is rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxengine.convert.errors import shown
from jaxengine.convert.families import fields
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import RopeSpec

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Spellings of a type in older checkpoints.
_TYPE_ALIASES = {"su": "longrope", "none": "default", "mrope": "default"}
# What a type cannot do without.
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
# Types whose factor stretches max_position_embeddings; those of the others include it already.
_STRETCHING = ("linear", "dynamic", "yarn")
_THETA_NAMES = ("rope_theta", "rotary_emb_base", "rope_base")
_FRACTION_NAMES = ("partial_rotary_factor", "rotary_pct", "rope_pct")


def read_rope(
    config: Config,
    head_dim: int,
    *,
    layer_type: str = "full_attention",
    theta: float = 10000.0,
    fraction: float = 1.0,
) -> RopeSpec:
    """Return the rotary embedding of a config, or of one kind of its layers.

    Args:
        config: Content of config.json.
        head_dim: H.
        layer_type: Which entry counts where ``rope_parameters`` has one for each kind of layer.
        theta: Base where the config names none.
        fraction: Share of H that is rotated where the config names none.

    Raises:
        ValueError: If the type is unknown, or a number is missing or makes no sense.
    """
    parameters = rope_parameters(config, layer_type)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    rope_type = _TYPE_ALIASES.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    parameters.pop("type", None)
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(
            f"config.json: rope_type {shown(rope_type)} is not supported: use one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    for name in _REQUIRED.get(rope_type, ()):
        if parameters.get(name) is None and config.get(name) is None:
            raise ValueError(f"rope_type {rope_type!r} needs {name}: config.json lacks it")
    theta = fields.number(
        {**config, **_present(parameters)}, *_THETA_NAMES, default=theta, low=1e-3
    )
    fraction = fields.number(
        {**config, **_present(parameters)}, *_FRACTION_NAMES, default=fraction, low=0.0, high=1.0
    )
    rotary_dim = fields.integer(
        config, "rotary_dim", default=int(head_dim * fraction), low=2, high=head_dim
    )
    merged = {**config, **_present(parameters)}
    names = ("original_max_position_embeddings", "max_position_embeddings")
    original = fields.integer(merged, *names, default=0, high=fields.MAX_LENGTH)
    if not original and rope_type not in ("default", "linear"):
        raise ValueError(
            f"rope_type {rope_type!r} needs {' or '.join(names)}: config.json has none"
        )
    kept = {k: v for k, v in parameters.items() if k not in (*_THETA_NAMES, *_FRACTION_NAMES)}
    kept.pop("original_max_position_embeddings", None)
    if rope_type == "longrope":
        kept = {**_longrope_parameters(config, original), **_present(kept)}
    for name in (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ):
        if kept.get(name) is not None:
            kept[name] = fields.number(kept, name, low=0.0)
    return RopeSpec(
        rotary_dim=rotary_dim - rotary_dim % 2,
        theta=theta,
        rope_type=rope_type,
        original_length=0 if rope_type in ("default", "linear") else original,
        parameters=tuple(sorted((k, _frozen(v)) for k, v in kept.items())),
    )


def rope_parameters(config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
    """The fields of ``rope_parameters`` or ``rope_scaling`` that count for a kind of layer."""
    found = fields.mapping(config, "rope_parameters") or fields.mapping(config, "rope_scaling")
    if isinstance(found.get(layer_type), Mapping):
        return dict(found[layer_type])
    return {k: v for k, v in found.items() if not isinstance(v, Mapping)}


def stretched_length(config: Config, length: int) -> int:
    """The longest sequence with the config's scaling, as vLLM has it.

    linear and dynamic multiply ``max_position_embeddings``; yarn multiplies the original length
    where it is named. llama3 and longrope do not, as theirs is in ``max_position_embeddings``.

    Args:
        config: Content of config.json.
        length: Its ``max_position_embeddings``.
    """
    parameters = rope_parameters(config)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in _STRETCHING or parameters.get("factor") is None:
        return length
    factor = fields.number(parameters, "factor", low=0.0)
    if rope_type == "yarn":
        length = fields.integer(
            parameters,
            "original_max_position_embeddings",
            default=length,
            high=fields.MAX_LENGTH,
        )
    return max(length, int(length * factor)) if factor > 1 else length


def _longrope_parameters(config: Config, original: int) -> dict[str, Any]:
    """What longrope takes from the config itself: its lists, and how far it stretches."""
    length = fields.max_positions(config, default=original)
    return {
        "short_factor": config.get("short_factor"),
        "long_factor": config.get("long_factor"),
        "factor": length / original,
    }


def _present(config: Config) -> dict[str, Any]:
    return {k: v for k, v in config.items() if v is not None}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
