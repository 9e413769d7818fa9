"""A family of models: the one row that tells the loader and the decoder all that is particular."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import ModelSpec
from jaxengine.convert.rules import Table


@dataclass(frozen=True)
class Family:
    """Models whose configs and checkpoints are read in the same way.

    Attributes:
        architectures: Names in ``architectures`` of config.json.
        spec: Makes the spec of a config.json, overrides applied. Raises ValueError, naming field
            and value, where the config makes no sense.
        table: Says where a checkpoint of such a spec keeps what.
        examples: Published models of it, for the documents.
    """

    architectures: tuple[str, ...]
    spec: Callable[[Config], ModelSpec]
    table: Callable[[ModelSpec], Table]
    examples: str = ""
