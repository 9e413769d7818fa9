"""Tests of jaxengine.engine.scheduling.request_queue."""

from jaxengine.engine.scheduling.request import Request
from jaxengine.engine.scheduling.request_queue import FCFSQueue, PriorityQueue, RequestQueue
from tests.engine.helpers import make_request


def drain(queue: RequestQueue) -> str:
    """The ids in the order of admission."""
    order = ""
    while len(queue):
        request = queue.peek()
        queue.remove(request)
        order += request.request_id
    return order


def fill(queue: RequestQueue, *requests: Request) -> None:
    for request in requests:
        queue.add(request)


def test_fcfs_keeps_the_order_of_arrival() -> None:
    queue = FCFSQueue()
    fill(queue, *map(make_request, "abc"))
    assert drain(queue) == "abc"


def test_fcfs_puts_preempted_requests_in_front() -> None:
    queue = FCFSQueue()
    fill(queue, *map(make_request, "ab"))
    queue.put_back(make_request("d"))
    queue.put_back(make_request("c"))  # preempted from the end, so it ran before d
    assert drain(queue) == "cdab"


def test_fcfs_forgets_a_removed_request() -> None:
    queue = FCFSQueue()
    a, b, c = map(make_request, "abc")
    fill(queue, a, b, c)
    queue.remove(b)
    assert drain(queue) == "ac"


def test_priority_comes_before_arrival() -> None:
    queue = PriorityQueue()
    fill(
        queue,
        make_request("a", priority=1, arrival_time=1.0),
        make_request("b", priority=0, arrival_time=3.0),
        make_request("c", priority=0, arrival_time=2.0),
    )
    assert drain(queue) == "cba"


def test_priority_ties_keep_the_order_in_which_they_were_added() -> None:
    queue = PriorityQueue()
    fill(queue, *map(make_request, "bac"))
    assert drain(queue) == "bac"


def test_priority_skips_removed_requests_and_takes_them_back() -> None:
    queue = PriorityQueue()
    a, b = make_request("a"), make_request("b", priority=1)
    fill(queue, a, b)
    queue.remove(a)
    assert len(queue) == 1
    assert queue.peek() is b
    queue.put_back(a)
    assert drain(queue) == "ab"
    queue.add(b)
    assert drain(queue) == "b"
