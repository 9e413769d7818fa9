"""Finds ``jaxengine.convert`` and ``jaxengine.pallas_kernels`` in a checkout, beside this package.

Installed, they are folders of this package and Python finds them itself. In a checkout they would
be found only by an editable install, and that may be one of another checkout.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
BESIDE = ("convert", "pallas_kernels")


class CheckoutFinder:
    """A finder (PEP 451) of the packages beside this one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a package beside this one is; None for any other module."""
        package, _, folder = name.partition(".")
        init = ROOT / folder / "__init__.py"
        if package != __package__ or folder not in BESIDE or not init.is_file():
            return None
        return spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])


def find_packages_beside() -> None:
    """Let imports find them, unless they are where an installation puts them."""
    if not (Path(__file__).parent / BESIDE[0]).is_dir():
        sys.meta_path.insert(0, CheckoutFinder())
