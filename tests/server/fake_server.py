"""jaxengine serve with the fake engine: ``python -m tests.server.fake_server MODEL``."""

import sys

from jaxengine.cli.serve import parse_serve
from jaxengine.server.launcher import serve

if __name__ == "__main__":
    sys.exit(serve(*parse_serve(sys.argv[1:]), engine_module="tests.server.fake_engine"))
