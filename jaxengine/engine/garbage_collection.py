"""Python's search for unreachable cycles, kept away from where it costs much and finds little."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Keep Python from searching all objects again and again.

    Tracing makes objects by the hundred thousand, and they stay: the searches that they set off
    took a third of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
