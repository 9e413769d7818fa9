"""Whether the engine makes progress."""

import time

from jaxengine.server.socket_client import SocketClient
from jaxengine.server.state import ServerState

SILENCE_S = 15.0  # the engine says every second that it lives, unless it holds its interpreter


def check_health(state: ServerState) -> str | None:
    """Return what is wrong; None if nothing is."""
    llm = state.llm
    if llm.dead_error is not None:
        return str(llm.dead_error)
    client = llm.client
    if isinstance(client, SocketClient):
        limit = state.settings.engine_step_timeout_s
        if client.step_age_s > limit:
            return f"the engine has work and made no step for {client.step_age_s:.0f} s"
        silence = time.monotonic() - client.last_heard
        if silence > max(SILENCE_S, limit):
            return f"the engine has said nothing for {silence:.0f} s"
    return None
