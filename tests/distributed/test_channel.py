"""Channels authenticate, keep order, and say when the other side is gone."""

import hmac
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from jaxengine.distributed import channel as channel_module
from jaxengine.distributed.channel import (
    NONCE_BYTES,
    AuthenticationError,
    Channel,
    ChannelClosedError,
    authenticate_client,
    authenticate_server,
)
from jaxengine.distributed.frames import MAX_ARRAY_BYTES, PREFIX, Frame

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    with first, second:
        yield first, second


@pytest.fixture
def pair(sockets: tuple[socket.socket, socket.socket]) -> tuple[Channel, Channel]:
    return Channel(sockets[0], 5.0), Channel(sockets[1], 5.0)


def outcomes(*calls: Callable[[], None]) -> list[Exception | None]:
    """What each of several concurrent calls raised."""
    errors: list[Exception | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except Exception as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return errors


def test_frames_arrive_in_order_from_several_threads(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    rng = np.random.default_rng(0)
    sent = [
        [Frame(str(thread), {"n": n}, (rng.integers(0, 9, 20000, np.int32),)) for n in range(20)]
        for thread in range(3)
    ]

    def send_all(frames: list[Frame]) -> None:
        for frame in frames:
            sender.send(frame)

    def receive_all() -> None:
        expected = {str(thread): iter(frames) for thread, frames in enumerate(sent)}
        for _ in range(60):
            frame = receiver.receive()
            other = next(expected[frame.kind])
            assert frame.values == other.values
            np.testing.assert_array_equal(frame.arrays[0], other.arrays[0])

    calls = [lambda frames=frames: send_all(frames) for frames in sent]
    assert outcomes(receive_all, *calls) == [None] * 4


def test_both_sides_accept_the_same_key(sockets: tuple[socket.socket, socket.socket]) -> None:
    client, server = sockets
    assert outcomes(
        lambda: authenticate_client(client, KEY, 5), lambda: authenticate_server(server, KEY)
    ) == [None, None]


def test_both_sides_refuse_another_key(sockets: tuple[socket.socket, socket.socket]) -> None:
    client, server = sockets
    errors = outcomes(
        lambda: authenticate_client(client, KEY, 5), lambda: authenticate_server(server, OTHER_KEY)
    )
    assert [type(error) for error in errors] == [AuthenticationError] * 2


def test_an_answer_sent_back_to_its_author_proves_nothing(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    client, server = sockets

    def mirror() -> None:
        for size in (NONCE_BYTES, hmac.new(KEY, digestmod=channel_module.DIGEST).digest_size):
            client.sendall(channel_module.read_exactly(client, size))

    errors = outcomes(mirror, lambda: authenticate_server(server, KEY))
    assert isinstance(errors[1], AuthenticationError)


def test_a_side_that_says_nothing_ends_the_handshake(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_TIMEOUT_S", 0.1)
    with pytest.raises(ChannelClosedError, match="nothing was heard"):
        authenticate_server(sockets[1], KEY)


def test_silence_is_an_error(sockets: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ChannelClosedError, match=r"nothing was heard for 0\.1 s"):
        Channel(sockets[0], 0.1).receive()


def test_the_end_of_the_other_side_is_an_error(pair: tuple[Channel, Channel]) -> None:
    first, second = pair
    second.send(Frame("last"))
    second.close()
    assert first.receive().kind == "last"
    with pytest.raises(ChannelClosedError, match="closed the connection"):
        first.receive()
    with pytest.raises(ChannelClosedError):
        second.send(Frame("late"))


def test_a_frame_that_is_too_long_is_not_read(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    sockets[1].sendall(PREFIX.pack(2, MAX_ARRAY_BYTES + 1))
    with pytest.raises(ValueError, match="is more than"):
        Channel(sockets[0], 1.0).receive()


def test_a_side_that_takes_nothing_is_an_error(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    sender = Channel(sockets[0], 0.2)
    large = Frame("x", {}, (np.zeros(1 << 23, np.int32),))
    with pytest.raises(ChannelClosedError):
        sender.send(large)
