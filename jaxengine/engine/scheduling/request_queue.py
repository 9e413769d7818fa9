"""The order in which waiting requests are admitted."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from jaxengine.engine.scheduling.request import Request


class RequestQueue(Protocol):
    """Waiting requests in the order of a policy. Every operation is at most O(log n)."""

    def add(self, request: Request) -> None:
        """Add a request that never ran."""

    def put_back(self, request: Request) -> None:
        """Add a request that was preempted."""

    def peek(self) -> Request:
        """Return the request to be admitted next, of at least one."""

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue."""

    def __iter__(self) -> Iterator[Request]:
        """Go through all requests, in no order that can be relied on."""

    def __len__(self) -> int: ...


class FCFSQueue:
    """First come, first served; a preempted request goes before those that never ran."""

    def __init__(self) -> None:
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def add(self, request: Request) -> None:
        """Add a request at the end."""
        self._requests[request] = None

    def put_back(self, request: Request) -> None:
        """Add a request at the front."""
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def peek(self) -> Request:
        """Return the request at the front."""
        return next(iter(self._requests))

    def remove(self, request: Request) -> None:
        """Take out a request."""
        del self._requests[request]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)


class PriorityQueue:
    """Smallest ``priority`` first, then earliest arrival.

    A removed request stays in the heap until it comes to the top, where it is skipped.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._entries: dict[Request, int] = {}  # request -> its valid entry number
        self._num_added = 0

    def add(self, request: Request) -> None:
        """Add a request."""
        self._num_added += 1
        self._entries[request] = self._num_added
        entry = (*scheduling_key(request), self._num_added, request)
        heapq.heappush(self._heap, entry)

    def put_back(self, request: Request) -> None:
        """Add a request that was preempted: its priority and arrival say where."""
        self.add(request)

    def peek(self) -> Request:
        """Return the request of the smallest key."""
        while self._entries.get(self._heap[0][3]) != self._heap[0][2]:
            heapq.heappop(self._heap)
        return self._heap[0][3]

    def remove(self, request: Request) -> None:
        """Take out a request."""
        del self._entries[request]
        if not self._entries:
            self._heap.clear()

    def __iter__(self) -> Iterator[Request]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def scheduling_key(request: Request) -> tuple[int, float]:
    """Return what the priority policy sorts by; smaller runs first."""
    return request.priority, request.arrival_time
