"""Ports for engines on this machine."""

import random
import socket


def free_ports() -> int:
    """A port that is free like the one after it."""
    for _ in range(100):
        port = random.randrange(20000, 32000, 2)  # below those that a system hands out
        try:
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")
