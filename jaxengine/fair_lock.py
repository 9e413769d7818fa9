"""A lock that goes to those who wait in the order in which they came."""

import collections
import threading
from types import TracebackType


class FairLock:
    """A lock for one thread at a time, handed on in the order of asking; reentrant.

    (``threading.Lock`` may be taken again by the thread that has just released it, however long
    others have waited: a thread that takes it for every step would keep all others out.)
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # held for a moment only
        self._owner: int | None = None
        self._depth = 0
        # The waiting threads, each with a lock that is released to wake it.
        self._queue: collections.deque[tuple[int, threading.Lock]] = collections.deque()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._mutex:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._queue.append((me, turn))
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while waiting
            self._leave_queue(me, turn)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._mutex:
            self._depth -= 1
            if self._depth == 0:
                self._hand_on()

    def _leave_queue(self, me: int, turn: threading.Lock) -> None:
        with self._mutex:
            if (me, turn) in self._queue:
                self._queue.remove((me, turn))
            elif self._owner == me:  # it was handed over in the same moment
                self._depth = 0
                self._hand_on()

    def _hand_on(self) -> None:
        if not self._queue:
            self._owner = None
            return
        self._owner, turn = self._queue.popleft()
        self._depth = 1
        turn.release()
