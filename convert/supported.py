"""Whether a model can be read, judged by its config.json alone."""

from __future__ import annotations

from jaxengine.convert.families import model_spec
from jaxengine.convert.families.fields import Config
from jaxengine.convert.quantised import quantisation_of


def check_supported(config: Config) -> None:
    """Refuse what cannot be read, before anything else of the model is fetched or opened.

    Args:
        config: Content of config.json, overrides applied.

    Raises:
        ValueError: If the architecture or the quantisation is not supported, or a field is missing
            or makes no sense.
    """
    quantisation_of(config)
    model_spec(config)
