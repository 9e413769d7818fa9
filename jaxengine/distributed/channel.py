"""Channel: an authenticated, ordered connection between two processes of one engine.

Both sides prove that they know the same key before a frame is read: each answers a random
challenge of the other with its HMAC. The frames themselves are neither encrypted nor signed: the
network between the hosts of one engine must be trusted, as it must be for the collectives.
"""

import contextlib
import hmac
import secrets
import socket
import threading
from collections.abc import Iterator

from jaxengine.distributed.frames import PREFIX, Frame, check_lengths, decode, encode

NONCE_BYTES = 32
DIGEST = "sha256"
HANDSHAKE_TIMEOUT_S = 5.0


class ChannelClosedError(ConnectionError):
    """The other side has closed the connection, or said nothing for too long."""


class AuthenticationError(ConnectionError):
    """The other side does not know the key."""


class Channel:
    """Sends and receives frames; several threads may send, one may receive.

    Args:
        connection: Connected and authenticated.
        timeout_s: Longest silence, and longest time for a frame to be taken.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a step is one frame
        connection.settimeout(timeout_s)
        self._connection = connection
        self._timeout_s = timeout_s
        self._send_lock = threading.Lock()

    def set_timeout(self, timeout_s: float) -> None:
        """Change the longest silence."""
        self._connection.settimeout(timeout_s)
        self._timeout_s = timeout_s

    def send(self, frame: Frame) -> None:
        """Send a frame.

        Raises:
            ChannelClosedError: If it cannot be sent.
        """
        data = encode(frame)
        with self._send_lock, _closed_errors(self._timeout_s):
            self._connection.sendall(data)

    def receive(self) -> Frame:
        """Wait for the next frame.

        Raises:
            ChannelClosedError: If none will come.
            ValueError: If what came is not a frame.
        """
        with _closed_errors(self._timeout_s):
            lengths = PREFIX.unpack(read_exactly(self._connection, PREFIX.size))
            num_header, num_body = check_lengths(*lengths)
            header = read_exactly(self._connection, num_header)
            return decode(header, read_exactly(self._connection, num_body))

    def close(self) -> None:
        """End the connection; a thread that waits in ``receive`` gets an error."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


@contextlib.contextmanager
def _closed_errors(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise ChannelClosedError(f"nothing was heard for {timeout_s:g} s") from error
    except OSError as error:
        if isinstance(error, ChannelClosedError):
            raise
        raise ChannelClosedError(f"the connection broke ({error})") from error


def read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """Read that many bytes.

    Raises:
        ChannelClosedError: If the connection ends before.
    """
    data = bytearray(num_bytes)
    view, filled = memoryview(data), 0
    while filled < num_bytes:
        count = connection.recv_into(view[filled:])
        if not count:
            raise ChannelClosedError("its process has closed the connection")
        filled += count
    return bytes(data)


def authenticate_client(connection: socket.socket, key: bytes, timeout_s: float) -> None:
    """Prove to a server that this side knows the key, and have it prove the same.

    Args:
        connection: To the server.
        key: The secret of both.
        timeout_s: Longest time without an answer. A server hears one client after the other and
            gives each ``HANDSHAKE_TIMEOUT_S``, so it should be several times that.

    Raises:
        AuthenticationError: If the other side has another key.
        ChannelClosedError: If it does not answer.
    """
    _handshake(connection, key, timeout_s, own_role=b"client", other_role=b"server")


def authenticate_server(connection: socket.socket, key: bytes) -> None:
    """The other half of ``authenticate_client``."""
    _handshake(connection, key, HANDSHAKE_TIMEOUT_S, own_role=b"server", other_role=b"client")


def _handshake(
    connection: socket.socket, key: bytes, timeout_s: float, own_role: bytes, other_role: bytes
) -> None:
    """Exchange challenges, then answers. The role in an answer stops it from being sent back."""
    connection.settimeout(timeout_s)
    with _closed_errors(timeout_s):
        challenge = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(challenge)
        theirs = read_exactly(connection, NONCE_BYTES)
        connection.sendall(_answer(key, own_role, theirs, challenge))
        expected = _answer(key, other_role, challenge, theirs)
        answer = read_exactly(connection, len(expected))
    if not hmac.compare_digest(answer, expected):
        raise AuthenticationError("the other side has another key")


def _answer(key: bytes, role: bytes, challenge: bytes, own_challenge: bytes) -> bytes:
    return hmac.digest(key, role + challenge + own_challenge, DIGEST)
