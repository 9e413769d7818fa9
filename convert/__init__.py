"""Reads model checkpoints of any format, and writes them as Orbax checkpoints of our tree."""

from jaxengine.convert.checkpoint import Checkpoint
from jaxengine.convert.families import model_spec, register_family
from jaxengine.convert.families.family import Family
from jaxengine.convert.parameters import Parameter, parameters
from jaxengine.convert.readers import open_checkpoint
from jaxengine.convert.save import ConversionSummary, convert_checkpoint
from jaxengine.convert.supported import check_supported

__all__ = [
    "Checkpoint",
    "ConversionSummary",
    "Family",
    "Parameter",
    "check_supported",
    "convert_checkpoint",
    "model_spec",
    "open_checkpoint",
    "parameters",
    "register_family",
]
