"""The metadata of a GGUF file, read key by key, each held to its type and to a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxengine.convert.errors import CheckpointError, integer, shown

REQUIRED: Any = object()


@dataclass(frozen=True)
class Metadata:
    """Keys with their values, as far as one architecture reads them.

    Attributes:
        path: The file, for messages.
        values: Every key of the file.
        architecture: What stands for ``{arch}`` in a key.
    """

    path: Path
    values: Mapping[str, Any]
    architecture: str = ""

    def key(self, key: str) -> str:
        """The key with the architecture filled in."""
        return key.replace("{arch}", self.architecture)

    def get(self, key: str) -> Any:
        """The value as it is; None where the key is absent."""
        return self.values.get(self.key(key))

    def integer(self, key: str, default: Any = REQUIRED, low: int = 0, high: int = 1 << 31) -> Any:
        """An integer; of one number a layer, the one that all layers have.

        Raises:
            CheckpointError: If it is missing without a default, no integer, out of bounds, or
                differs from layer to layer.
        """
        value = self._one(key)
        if value is None:
            return self._default(key, default)
        return integer(value, self.path, self.key(key), low, high)

    def integers(self, key: str, count: int, low: int = 0, high: int = 1 << 31) -> list[int] | None:
        """One integer for each of ``count`` layers, also where the file has one for all; or None.

        Raises:
            CheckpointError: If there are fewer, or one is no integer or out of bounds.
        """
        value = self.get(key)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value] * count
        if len(values) < count:
            raise CheckpointError(
                f"{self.path}: {self.key(key)} has {len(values)} entries, there are {count} layers"
            )
        return [integer(each, self.path, self.key(key), low, high) for each in values[:count]]

    def number(self, key: str, default: Any = REQUIRED, low: float = 0.0) -> Any:
        """A finite number of at least ``low``.

        Raises:
            CheckpointError: If it is missing without a default, no number, or out of bounds.
        """
        value = self._one(key)
        if value is None:
            return self._default(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= 1e30:
            raise CheckpointError(
                f"{self.path}: {self.key(key)} is {shown(value)}, possible is a number from {low} "
                "to 1e30"
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; some writers say 1 or 0.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if value not in (0, 1) or not isinstance(value, int):
            raise CheckpointError(
                f"{self.path}: {self.key(key)} is {shown(value)}, possible is true or false"
            )
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {self.key(key)} is {shown(value)}, no text")
        return default if value is None else value

    def items(self, key: str, *kinds: type, least: int = 0) -> list[Any] | None:
        """An array of at least ``least`` items of these types; None where the key is absent.

        Raises:
            CheckpointError: If it is something else, or too short.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not set(map(type, value)) <= set(kinds):
            raise CheckpointError(
                f"{self.path}: {self.key(key)} is {shown(value)}, expected an array of "
                f"{' or '.join(kind.__name__ for kind in kinds)}"
            )
        if len(value) < least:
            raise CheckpointError(
                f"{self.path}: {self.key(key)} has {len(value)} entries, at least {least} are "
                "needed: the file is damaged"
            )
        return value

    def _one(self, key: str) -> Any:
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if not value or any(each != value[0] for each in value):
            raise CheckpointError(
                f"{self.path}: {self.key(key)} differs from layer to layer: not supported for "
                f"{self.architecture}"
            )
        return value[0]

    def _default(self, key: str, default: Any) -> Any:
        if default is REQUIRED:
            raise CheckpointError(f"{self.path} lacks the metadata key {self.key(key)}")
        return default
