"""Fields of a config.json replaced by the user's, before anything reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]
Overrides = Mapping[str, Any] | Callable[[dict[str, Any]], Config]

_OLD_ROPE_NAMES = ("rope_scaling", "rope_theta", "partial_rotary_factor")


def override_config(config: Config, overrides: Overrides | None) -> dict[str, Any]:
    """Return a config with fields replaced.

    An object replaces a field that holds one whole, as vLLM does; but a config that holds another
    one (``text_config``), or dotted names, are followed into it.

    Args:
        config: Content of config.json.
        overrides: Fields and their values, ``"text_config.rope_theta"`` for a nested one; or a
            function that maps a copy of the config to the one to use.

    Raises:
        ValueError: If it is neither, or a dotted name leads through a field that is no object.
    """
    if not overrides:
        return dict(config)
    if callable(overrides):
        result = overrides(_copied(config))
        if not isinstance(result, Mapping):
            raise ValueError(
                f"hf_overrides is a function that returned {type(result).__name__}: it must return "
                "the config, a dict"
            )
        return dict(result)
    if not isinstance(overrides, Mapping):
        raise ValueError(
            f"hf_overrides is {overrides!r}: use a dict of config.json's fields, or a function"
        )
    merged = _copied(config)
    for name, value in overrides.items():
        _replace(merged, str(name).split("."), value)
    return merged


def _replace(config: dict[str, Any], path: list[str], value: Any) -> None:
    name, *rest = path
    if rest:
        inner = config.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(
                f"hf_overrides names {'.'.join(path)}, but {name} is {inner!r} and not an object"
            )
        _replace(inner, rest, value)
    elif name.endswith("_config") and isinstance(value, Mapping) and config.get(name):
        for inner_name, inner_value in value.items():
            _replace(config[name], [str(inner_name)], inner_value)
    else:
        config[name] = value
        if name in _OLD_ROPE_NAMES:
            _replace_rope(config, name, value)


def _replace_rope(config: dict[str, Any], name: str, value: Any) -> None:
    """Bring an override in the old spelling into the new one, which would win over it."""
    if not isinstance(new := config.get("rope_parameters"), dict):
        return
    for own in [v for v in new.values() if isinstance(v, dict)] or [new]:
        if name != "rope_scaling":
            own[name] = value
            continue
        kept = {k: own[k] for k in ("rope_theta", "partial_rotary_factor") if k in own}
        own.clear()
        own.update(kept)
        own.update(value or {"rope_type": "default"})


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value
