"""``python -m jaxengine``: the command line."""

import sys

from jaxengine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
