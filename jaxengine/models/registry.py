"""HF architecture -> what reads and what computes it. Outside packages add theirs here."""

from collections.abc import Callable

from flax import nnx

from jaxengine.convert.families import architecture_of, register_family, supported_architectures
from jaxengine.convert.families.family import Family
from jaxengine.model_config import ModelConfig
from jaxengine.models.decoder import Decoder
from jaxengine.models.options import ModelOptions

ModelFactory = Callable[[ModelConfig, ModelOptions], nnx.Module]


class ModelRegistry:
    """The models that can be served.

    A family says what its configs and checkpoints mean; ``Decoder`` computes any of them. One that
    it cannot express brings a model of its own, which is called as ``Decoder`` is:
    ``model(batch, caches, hidden)`` and ``compute_logits``.
    """

    _models: dict[str, ModelFactory] = {}  # noqa: RUF012 - the one registry is meant to be shared

    @classmethod
    def register_model(cls, family: Family, model: ModelFactory | None = None) -> None:
        """Add or replace a family.

        Args:
            family: As those in ``convert/families``.
            model: Class (or function) that builds its module from config and options; None for
                ``Decoder``.

        Raises:
            ValueError: If ``family`` is none.
        """
        if not isinstance(family, Family):
            raise ValueError(
                f"register_model was given {family!r}: pass a jaxengine.convert.Family (see "
                "docs/adding-a-model.md)"
            )
        register_family(family)
        for architecture in family.architectures:
            cls._models.pop(architecture, None)
            if model is not None:
                cls._models[architecture] = model

    @classmethod
    def supported(cls) -> list[str]:
        """Names of the architectures that can be served."""
        return supported_architectures()

    @classmethod
    def resolve(cls, architecture: str) -> ModelFactory:
        """Return what builds the model of an architecture.

        Raises:
            ValueError: If there is none, naming those there are.
        """
        return cls._models.get(architecture_of({"architectures": [architecture]}), Decoder)
