"""The leader with followers that are only a socket: what it sends, and what it says of a loss."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.batch import StepShape
from jaxengine.distributed import leader as leader_module
from jaxengine.distributed.channel import Channel
from jaxengine.distributed.frames import Frame
from jaxengine.distributed.heartbeat import HEARTBEAT
from jaxengine.distributed.leader import HostLostError, Leader
from jaxengine.distributed.roll_call import Follower
from jaxengine.distributed.step_frames import decode_step
from jaxengine.engine.device.step_inputs import StepInputs
from jaxengine.engine.sampling.sampling_inputs import SamplerVariant

STEP = StepInputs(
    shape=StepShape(2, 2, True),
    packed=np.arange(9, dtype=np.int32),
    table_updates=None,
    variant=SamplerVariant(),
    sampling=np.zeros(0, np.int32),
    scoring=None,
    token_targets=np.array([0, 1], np.int32),
    num_token_stores=0,
)


class NeverReady:
    """A result that waits for a host which is gone."""

    def is_ready(self) -> bool:
        return False


class Failed:
    """A result whose collective has failed."""

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> None:
        raise ValueError("the collective has failed")


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Leader, list[Channel]]]:
    """A leader, and its followers' ends of the connections."""
    monkeypatch.setattr(leader_module, "FAREWELL_S", 0.1)
    monkeypatch.setattr(leader_module, "NOTICE_S", 0.3)
    monkeypatch.setattr(leader_module.atexit, "register", lambda _: None)
    followers, ends = [], []
    for rank in (1, 2):
        ours, theirs = _tcp_pair()
        followers.append(Follower(rank, f"host{rank}", 100 + rank, Channel(ours, 5.0)))
        ends.append(Channel(theirs, 5.0))
    leader = Leader(followers)
    leader.unfinished_requests = lambda: ["a", "b"]
    yield leader, ends
    leader.close()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        return first, listener.accept()[0]


def next_frame(channel: Channel) -> Frame:
    while (frame := channel.receive()).kind == HEARTBEAT:
        pass
    return frame


def error_of(call: Callable[[], object]) -> Exception:
    """Call again and again until it raises, and return that."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            call()
        except Exception as error:
            return error
        time.sleep(0.01)
    raise AssertionError("it never raised")


def test_every_follower_gets_every_step_in_order(hosts: tuple[Leader, list[Channel]]) -> None:
    leader, ends = hosts
    leader.hooks(0).on_dispatch(STEP)
    leader.hooks(3).on_dispatch(STEP)
    for end in ends:
        assert [decode_step(next_frame(end))[0] for _ in range(2)] == [0, 3]


def test_the_smallest_number_of_blocks_is_agreed_on(hosts: tuple[Leader, list[Channel]]) -> None:
    leader, ends = hosts
    for end, number in zip(ends, (70, 50), strict=True):
        end.send(Frame("blocks", {"num_blocks": number}))
    assert leader.hooks().agree_on_blocks(60) == 50
    assert [next_frame(end).values for end in ends] == [{"num_blocks": 50}] * 2


def test_waiting_for_a_lost_host_ends_with_its_name_and_the_requests(
    hosts: tuple[Leader, list[Channel]],
) -> None:
    leader, ends = hosts
    threading.Timer(0.2, ends[1].close).start()
    with pytest.raises(HostLostError, match=r"node 2 \(host2, process 102\) is lost.*a, b") as info:
        leader.wait(NeverReady())  # type: ignore[arg-type]
    assert info.value.request_ids == ["a", "b"]
    with pytest.raises(HostLostError, match="node 2"):
        leader.hooks().on_dispatch(STEP)


def test_a_failed_collective_is_blamed_on_the_host_that_was_lost(
    hosts: tuple[Leader, list[Channel]],
) -> None:
    leader, ends = hosts
    threading.Timer(0.1, ends[0].close).start()
    with pytest.raises(HostLostError, match="node 1"):
        leader.wait(Failed())  # type: ignore[arg-type]


def test_a_failure_without_a_loss_stays_what_it_is(hosts: tuple[Leader, list[Channel]]) -> None:
    with pytest.raises(ValueError, match="the collective has failed"):
        hosts[0].wait(Failed())  # type: ignore[arg-type]


def test_a_result_that_is_there_is_waited_for(hosts: tuple[Leader, list[Channel]]) -> None:
    hosts[0].wait(jnp.arange(3) + 1)


def test_a_follower_that_fails_says_why(hosts: tuple[Leader, list[Channel]]) -> None:
    leader, ends = hosts
    ends[0].send(Frame("failed", {"error": "ValueError: no such file"}))
    with pytest.raises(HostLostError, match=r"node 1 .* has failed: ValueError: no such file"):
        leader.wait_until_ready()


def test_bytes_that_are_no_frame_end_the_engine(hosts: tuple[Leader, list[Channel]]) -> None:
    leader, ends = hosts
    ends[0]._connection.sendall(b"\xff" * 64)
    assert "node 1" in str(error_of(leader.check))


def test_a_step_that_failed_on_the_leader_ends_the_engine(
    hosts: tuple[Leader, list[Channel]],
) -> None:
    hooks = hosts[0].hooks()
    hooks.on_dispatch(STEP)
    try:
        raise MemoryError("none left")
    except MemoryError:
        with pytest.raises(HostLostError, match=r"failed on the leader \(MemoryError: none left"):
            hooks.on_restore()


def test_ctrl_c_inside_a_launch_ends_the_engine(hosts: tuple[Leader, list[Channel]]) -> None:
    hooks = hosts[0].hooks()
    hooks.on_dispatch(STEP)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(HostLostError, match="failed on the leader"):
            hooks.on_restore()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_after_an_error_between_steps_all_go_on(
    hosts: tuple[Leader, list[Channel]], kind: type[BaseException]
) -> None:
    leader, ends = hosts
    hooks = leader.hooks(1)
    hooks.on_dispatch(STEP)
    leader.wait(jnp.zeros(1))
    try:
        raise kind
    except kind:
        hooks.on_restore()
    hooks.on_dispatch(STEP)
    for end in ends:
        frames = [next_frame(end) for _ in range(3)]
        assert [frame.kind for frame in frames] == ["step", "restore", "step"]
        assert frames[1].values == {"replica": 1}


def test_a_process_that_hangs_in_a_collective_is_ended(
    hosts: tuple[Leader, list[Channel]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leader, ends = hosts
    ended: list[int] = []
    monkeypatch.setattr(leader_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(leader_module.os, "_exit", ended.append)
    leader.hooks().on_dispatch(STEP)  # and the call after it never returns
    ends[1].close()
    deadline = time.monotonic() + 5
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended == [1]
    message = capsys.readouterr().err
    assert "node 2" in message
    assert "a, b" in message


def test_a_leader_that_is_idle_is_not_ended(
    hosts: tuple[Leader, list[Channel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, ends = hosts
    ended: list[int] = []
    monkeypatch.setattr(leader_module, "PATIENCE_S", 0.1)
    monkeypatch.setattr(leader_module.os, "_exit", ended.append)
    leader.hooks().on_dispatch(STEP)
    leader.wait(jnp.zeros(1))
    ends[0].close()
    assert "node 1" in str(error_of(leader.check))
    time.sleep(0.4)
    assert ended == []


def test_the_end_of_the_leader_is_told(hosts: tuple[Leader, list[Channel]]) -> None:
    leader, ends = hosts
    leader.close()
    assert [next_frame(end).kind for end in ends] == ["shutdown"] * 2


def test_a_start_that_fails_on_the_leader_ends_the_followers(
    hosts: tuple[Leader, list[Channel]],
) -> None:
    leader, ends = hosts
    with pytest.raises(MemoryError), leader.closed_on_failure():
        raise MemoryError
    assert [next_frame(end).kind for end in ends] == ["shutdown"] * 2
