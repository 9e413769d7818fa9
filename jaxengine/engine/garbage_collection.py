"""Python's search for unreachable cycles, kept away from where it costs much and finds little."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Keep Python from searching all objects again and again; search once at the end.

    Tracing makes objects by the hundred thousand, and they stay: the searches that they set off
    took a third of its time. Without the one at the end, the next three, 0.3 s each, would come in
    the middle of the first requests: what has survived a full search counts as old.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            gc.collect()
