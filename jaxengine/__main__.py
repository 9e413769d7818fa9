"""``python -m jaxengine``: the command line."""

import sys

from jaxengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
