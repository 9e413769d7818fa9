"""Which devices may write to each other's memory; the memory itself needs GPUs."""

import ctypes
import types
from typing import Any

import jax
import pytest

from jaxengine.engine.device.peer_memory import reach_each_other


class FakeDriver:
    """libcuda, for devices of which some pairs have no way to each other."""

    def __init__(self, barred: set[tuple[int, int]]) -> None:
        self.barred = barred

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:  # noqa: N802 (the driver's name)
        handle._obj.value = 100 + ordinal
        return 0 if ordinal < 4 else 101

    def cuDeviceCanAccessPeer(self, answer: Any, device: Any, peer: Any) -> int:  # noqa: N802
        answer._obj.value = (device.value - 100, peer.value - 100) not in self.barred
        return 0


def gpus(*ordinals: int, process_index: int = 0) -> list[Any]:
    return [
        types.SimpleNamespace(platform="gpu", process_index=process_index, local_hardware_id=i)
        for i in ordinals
    ]


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(barred=set())
    monkeypatch.setattr(ctypes, "CDLL", lambda _: fake)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
    return fake


def test_gpus_that_the_driver_connects_reach_each_other() -> None:
    assert reach_each_other(gpus(0, 1, 3))


def test_one_pair_without_a_way_is_enough_to_leave_it(driver: FakeDriver) -> None:
    driver.barred.add((3, 1))
    assert not reach_each_other(gpus(0, 1, 3))
    assert reach_each_other(gpus(0, 1))


def test_a_gpu_that_the_driver_does_not_know_is_not_reached() -> None:
    assert not reach_each_other(gpus(0, 4))


def test_cpus_and_gpus_of_another_process_are_not_reached() -> None:
    assert not reach_each_other(jax.devices("cpu"))
    assert not reach_each_other([*gpus(0), *gpus(1, process_index=1)])


@pytest.mark.parametrize(("allocator", "expected"), [("platform", True), ("cuda_async", False)])
def test_xlas_allocator_decides_too(
    allocator: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", allocator)
    assert reach_each_other(gpus(0, 1)) == expected


def test_without_nvidias_driver_nothing_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not reach_each_other(gpus(0, 1))
