"""How long jax compiles in the calling thread, from the events that jax itself gives out."""

import functools
import threading
import time
from collections.abc import Callable

_EVENTS = "/jax/core/compile/"  # tracing, lowering, XLA; each when it has ended
_current = threading.local()


class CompileWatch:
    """Counts compilation while it is entered, in its own thread only.

    Args:
        on_event: Called whenever a part of a compilation has ended; another may follow.
    """

    def __init__(self, on_event: Callable[[], object] = lambda: None) -> None:
        self._on_event = on_event
        self._spans: list[tuple[float, float]] = []  # disjoint, rising
        self._outer: CompileWatch | None = None

    @property
    def seconds(self) -> float:
        """Seconds in which something compiled."""
        return sum(end - start for start, end in self._spans)

    def __enter__(self) -> "CompileWatch":
        _start_listening()
        self._outer = getattr(_current, "watch", None)
        _current.watch = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.watch = self._outer

    def record(self, start: float, end: float) -> None:
        """Take in a span. Spans nest (a function is traced inside another): none counts twice."""
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))
        self._on_event()
        if self._outer is not None:
            self._outer.record(start, end)


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    watch: CompileWatch | None = getattr(_current, "watch", None)
    if watch is not None and event.startswith(_EVENTS):
        now = time.perf_counter()
        watch.record(now - duration_secs, now)


@functools.cache
def _start_listening() -> None:
    import jax  # only now: the command line's help does without it

    jax.monitoring.register_event_duration_secs_listener(_listen)
