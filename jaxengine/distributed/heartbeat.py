"""Heartbeats: a thread that says each second that its process is alive."""

import contextlib
import threading
from collections.abc import Sequence

from jaxengine.distributed.channel import Channel, ChannelClosedError
from jaxengine.distributed.frames import Frame

HEARTBEAT = "heartbeat"
INTERVAL_S = 1.0


class Heartbeat:
    """Sends heartbeats through channels until it is stopped.

    Each channel has a thread, so that one that takes nothing delays no other.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._stopped = threading.Event()
        for channel in channels:
            threading.Thread(target=self._beat, args=(channel,), daemon=True).start()

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()

    def _beat(self, channel: Channel) -> None:
        with contextlib.suppress(ChannelClosedError):  # whoever receives will notice
            while not self._stopped.wait(INTERVAL_S):
                channel.send(Frame(HEARTBEAT))
