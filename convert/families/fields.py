"""Reads fields of a config.json, each held to its type and to a limit before anything trusts it.

A config is data from outside: a number in it may decide how much is allocated or looped over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxengine.convert.errors import shown

Config = Mapping[str, Any]

# Above what any published model has; a config beyond is damaged, or wants to exhaust memory.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_WIDTH = 1 << 20  # of the residual stream and of feed-forward layers
MAX_VOCABULARY = 1 << 24
MAX_LENGTH = 1 << 28  # tokens of a sequence

_REQUIRED: Any = object()


def integer(
    config: Config, *names: str, default: Any = _REQUIRED, low: int = 1, high: int = MAX_WIDTH
) -> int:
    """The first of some fields that is there and not null, as an integer.

    Args:
        config: Content of config.json.
        names: Spellings of the field, the usual one first.
        default: What absence means; without it absence is an error. May be None.
        low: Least value.
        high: Largest value.

    Raises:
        ValueError: If there is none, or it is no integer between the bounds.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(
                f"config.json has {name}={shown(value)}: an integer between {low} and {high} is "
                "needed"
            )
        return value
    if default is _REQUIRED:
        raise ValueError(f"config.json lacks {names[0]}: a positive integer is needed")
    return default


def number(
    config: Config,
    *names: str,
    default: Any = _REQUIRED,
    low: float = -1e30,
    high: float = 1e30,
) -> float:
    """The first of some fields that is there and not null, as a finite float; see ``integer``."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # which no NaN is
            raise ValueError(
                f"config.json has {name}={shown(value)}: a number between {low} and {high} is "
                "needed"
            )
        return float(value)
    if default is _REQUIRED:
        raise ValueError(f"config.json lacks {names[0]}: a number is needed")
    return default


def flag(config: Config, *names: str, default: bool = False) -> bool:
    """The first of some fields that is there and not null, as a boolean.

    Raises:
        ValueError: If it is not one.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, bool) and value not in (0, 1):
            raise ValueError(f"config.json has {name}={shown(value)}: true or false is needed")
        return bool(value)
    return default


def text(config: Config, *names: str, default: str) -> str:
    """The first of some fields that is there and not null, as a string.

    Raises:
        ValueError: If it is not one.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"config.json has {name}={shown(value)}: a string is needed")
        return value
    return default


def mapping(config: Config, name: str) -> Config:
    """A field that holds an object; {} where it is absent or null.

    Raises:
        ValueError: If it holds something else.
    """
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json has {name}={shown(value)}: an object is needed")
    return value


def list_of_layers(config: Config, name: str, num_layers: int) -> list[Any] | None:
    """A field that has an entry a layer; None where it is absent or null.

    Raises:
        ValueError: If it is no list, or of another length.
    """
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != num_layers:
        length = len(value) if isinstance(value, list | tuple) else shown(value)
        raise ValueError(
            f"config.json has {name} of {length} entries: one for each of {num_layers} layers is "
            "needed"
        )
    return list(value)


def num_layers(config: Config, *names: str) -> int:
    """How many layers there are."""
    return integer(config, *(names or ("num_hidden_layers",)), high=MAX_LAYERS)


def vocab_size(config: Config, *names: str) -> int:
    """V."""
    return integer(config, *(names or ("vocab_size",)), high=MAX_VOCABULARY)


def head_counts(config: Config) -> tuple[int, int]:
    """Query and KV heads.

    Raises:
        ValueError: If one is not a multiple of the other.
    """
    num_heads = integer(config, "num_attention_heads", high=MAX_HEADS)
    num_kv_heads = integer(config, "num_key_value_heads", default=num_heads, high=MAX_HEADS)
    check_groups(num_heads, num_kv_heads)
    return num_heads, num_kv_heads


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raise if query heads do not divide by KV heads.

    Raises:
        ValueError: Naming both.
    """
    if num_heads % num_kv_heads:
        raise ValueError(
            f"config.json has {num_heads} attention heads and {num_kv_heads} KV heads: the first "
            "must be a multiple of the second"
        )


def head_dim(config: Config, num_heads: int, default: int | None = None) -> int:
    """H: the config's, else ``default``, else hidden size / heads.

    Raises:
        ValueError: If the heads do not divide the hidden size.
    """
    if default is None and config.get("head_dim") is None:
        hidden_size = integer(config, "hidden_size", "n_embd", "d_model")
        if hidden_size % num_heads:
            raise ValueError(
                f"config.json has hidden_size={hidden_size}, which {num_heads} heads do not "
                "divide, and no head_dim"
            )
        default = hidden_size // num_heads
    return integer(config, "head_dim", default=default, high=MAX_HEAD_DIM)


def max_positions(config: Config, *names: str, default: Any = _REQUIRED) -> int:
    """The longest sequence that the checkpoint was made for, before any scaling."""
    return integer(
        config, *(names or ("max_position_embeddings",)), default=default, high=MAX_LENGTH
    )


def window(config: Config, default: int | None = None) -> int | None:
    """The sliding window, in tokens; None where it is null, or absent without a ``default``."""
    if config.get("sliding_window", default) is None:
        return None
    return integer(config, "sliding_window", default=default, high=MAX_LENGTH)
