"""A served model as research code sees it: a pure function, its points, weights to change."""

from jaxengine.research.functional import Edit, FunctionalModel
from jaxengine.research.points import Point

__all__ = ["Edit", "FunctionalModel", "Point"]
