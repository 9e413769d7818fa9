"""Connection: the engine's end of a socket to a front end. Messages in order, both ways.

The engine's thread sends, and must never wait for a front end that is slow: what a socket does not
take at once is sent by a thread of its own.
"""

import collections
import contextlib
import socket
import struct
import threading

from jaxengine.distributed.channel import (
    ChannelClosedError,
    authenticate_client,
    authenticate_server,
    read_exactly,
)
from jaxengine.server.wire import MAX_MESSAGE_BYTES, Message, WireError, pack, unpack

PREFIX = struct.Struct(">I")  # bytes of the message
MAX_BACKLOG_BYTES = 256 << 20  # a front end that is further behind is given up
CONNECT_TIMEOUT_S = 30.0

__all__ = ["ChannelClosedError", "Connection", "accept", "connect", "framed", "message_size"]


def framed(message: Message) -> bytes:
    """Return a message with its length in front."""
    data = pack(message)
    return PREFIX.pack(len(data)) + data


def message_size(prefix: bytes) -> int:
    """Return the length that stands in front of a message.

    Raises:
        WireError: If no message is that long.
    """
    (size,) = PREFIX.unpack(prefix)
    if size > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {size} bytes is more than {MAX_MESSAGE_BYTES}")
    return int(size)


def accept(listener: socket.socket, key: bytes) -> "Connection":
    """Wait for a front end that knows the key.

    Raises:
        ConnectionError: If one came that does not.
    """
    client, _ = listener.accept()
    try:
        authenticate_server(client, key)
    except BaseException:
        client.close()
        raise
    return Connection(client)


def connect(path: str, key: bytes) -> socket.socket:
    """Return a socket to the engine that listens at a path; it knows the key.

    Raises:
        ConnectionError: If it does not, or nobody listens.
    """
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(path)
        authenticate_client(client, key, CONNECT_TIMEOUT_S)
    except BaseException:
        client.close()
        raise
    client.settimeout(None)
    return client


class Connection:
    """Sends and receives messages; several threads may send, one may receive.

    Args:
        client: Connected and authenticated.
    """

    def __init__(self, client: socket.socket) -> None:
        client.settimeout(None)
        self._client = client
        self._backlog: collections.deque[bytes] = collections.deque()
        self._backlog_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None

    def send(self, message: Message) -> None:
        """Send a message; returns at once.

        Raises:
            ChannelClosedError: If the front end is gone, or too far behind.
        """
        data = framed(message)
        with self._changed:
            if self._is_closed:
                raise ChannelClosedError("the connection is closed")
            sent = 0 if self._backlog else self._send_now(data)
            if sent < len(data):
                self._postpone(data[sent:])

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            ChannelClosedError: If none will come.
            WireError: If what came is none.
        """
        try:
            size = message_size(read_exactly(self._client, PREFIX.size))
            return unpack(read_exactly(self._client, size))
        except OSError as error:
            raise ChannelClosedError(f"the connection broke ({error})") from error

    def close(self) -> None:
        """End the connection; a thread that waits in ``receive`` gets an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._client.close()

    def _send_now(self, data: bytes) -> int:
        try:
            return self._client.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._is_closed = True
            raise ChannelClosedError(f"the connection broke ({error})") from error

    def _postpone(self, data: bytes) -> None:
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        if self._backlog_bytes > MAX_BACKLOG_BYTES:
            self._is_closed = True
            raise ChannelClosedError(f"a front end is {self._backlog_bytes} bytes behind")
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, daemon=True)
            self._writer.start()
        self._changed.notify_all()

    def _write(self) -> None:
        """Send what has been put off (a thread of its own)."""
        while True:
            with self._changed:
                while not self._backlog and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                data = self._backlog[0]
            try:
                self._client.sendall(data)
            except OSError:
                self.close()
                return
            with self._changed:
                self._backlog.popleft()
                self._backlog_bytes -= len(data)
