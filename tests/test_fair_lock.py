"""FairLock: one thread at a time, in the order of asking."""

import threading

from jaxengine.fair_lock import FairLock


def test_the_lock_is_handed_on_in_the_order_of_asking() -> None:
    lock, order = FairLock(), []
    lock.__enter__()
    threads = []
    for name in "abc":
        thread = threading.Thread(target=lambda name=name: _note(lock, order, name), daemon=True)
        threads.append(thread)
        thread.start()
        while len(lock._queue) < len(threads):  # until it waits
            thread.join(0.001)
    order.append("first")
    lock.__exit__(None, None, None)
    for thread in threads:
        thread.join(30)
    assert order == ["first", "a", "b", "c"]


def test_a_thread_that_has_just_released_it_waits_behind_the_others() -> None:
    lock, order = FairLock(), []
    lock.__enter__()
    other = threading.Thread(target=lambda: _note(lock, order, "other"), daemon=True)
    other.start()
    while not lock._queue:
        other.join(0.001)
    lock.__exit__(None, None, None)
    _note(lock, order, "again")
    other.join(30)
    assert order == ["other", "again"]


def test_its_thread_may_take_it_twice() -> None:
    lock, order = FairLock(), []
    with lock, lock:
        other = threading.Thread(target=lambda: _note(lock, order, "other"), daemon=True)
        other.start()
        while not lock._queue:
            other.join(0.001)
        lock.__exit__(None, None, None)
        assert order == []
        lock.__enter__()
    other.join(30)
    assert order == ["other"]


def _note(lock: FairLock, order: list[str], name: str) -> None:
    with lock:
        order.append(name)
