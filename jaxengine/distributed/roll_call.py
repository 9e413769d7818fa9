"""The start: the followers find the leader, both prove the key, and compare what they will run.

It comes before jax knows of several hosts, because jax ends a process without an exception when
one of the others does not come.
"""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable

from jaxengine.config import EngineConfig
from jaxengine.distributed.channel import (
    HANDSHAKE_TIMEOUT_S,
    AuthenticationError,
    Channel,
    ChannelClosedError,
    authenticate_client,
    authenticate_server,
)
from jaxengine.distributed.frames import Frame
from jaxengine.distributed.identity import Facts, describe_difference

KEY_VARIABLE = "JAXENGINE_CLUSTER_KEY"
MIN_KEY_LENGTH = 16
SILENCE_S = 10.0  # of a process that sends a heartbeat each second
RETRY_S = 0.2


class HostsError(RuntimeError):
    """The processes of an engine did not find together."""


@dataclasses.dataclass(frozen=True)
class Follower:
    """A process that has come.

    Attributes:
        rank: Its node_rank.
        host: Its host's name and address.
        pid: Its process id there.
    """

    rank: int
    host: str
    pid: int
    channel: Channel

    def __str__(self) -> str:
        return f"node {self.rank} ({self.host}, process {self.pid})"


def cluster_key() -> bytes:
    """Return the key that the processes of an engine share.

    Raises:
        ValueError: If the environment has none, or a short one.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < MIN_KEY_LENGTH:
        raise ValueError(
            f"{KEY_VARIABLE} has {len(key)} characters, at least {MIN_KEY_LENGTH} are needed: set "
            "it to the same random text on every host, for example from 'openssl rand -hex 32'"
        )
    return key.encode()


def gather_followers(
    config: EngineConfig, facts: Facts, key: bytes, check: Callable[[], None] = lambda: None
) -> list[Follower]:
    """Wait for every follower, in order of rank (leader).

    Args:
        config: Of the leader.
        facts: What the followers must agree with.
        key: From ``cluster_key``.
        check: Called again and again; raises if waiting has become useless.

    Raises:
        HostsError: If one does not come in time or runs something else.
    """
    address = (config.master_addr, config.master_port + 1)
    deadline = time.monotonic() + config.distributed_timeout_seconds
    followers: dict[int, Follower] = {}
    with contextlib.ExitStack() as undo, _listen(address) as listener:
        undo.callback(_close_all, followers)
        while len(followers) < config.nnodes - 1:
            check()
            if time.monotonic() > deadline:
                raise HostsError(_absence(config, followers))
            follower = _accept(listener, config, facts, key)
            if follower is not None:
                _check_rank(follower, config, followers)
                followers[follower.rank] = follower
        for follower in followers.values():
            follower.channel.set_timeout(SILENCE_S)  # from here on all send heartbeats
            follower.channel.send(Frame("welcome"))
        undo.pop_all()
    return [followers[rank] for rank in sorted(followers)]


def _close_all(followers: dict[int, Follower]) -> None:
    for follower in followers.values():
        follower.channel.close()


def _listen(address: tuple[str, int]) -> socket.socket:
    try:
        listener = socket.create_server(address, family=_family(address))
    except OSError as error:
        raise HostsError(
            f"cannot listen on {address[0]} port {address[1]} ({error}): use an address of this "
            "host as master_addr, and a master_port that is free like the one after it"
        ) from error
    listener.settimeout(RETRY_S)
    return listener


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def _absence(config: EngineConfig, followers: dict[int, Follower]) -> str:
    absent = [str(rank) for rank in range(1, config.nnodes) if rank not in followers]
    there = ", ".join(str(follower) for follower in followers.values()) or "none"
    return (
        f"node {', '.join(absent)} of {config.nnodes} did not come to {config.master_addr} port "
        f"{config.master_port + 1} within {config.distributed_timeout_seconds} s (there: the "
        f"leader; others: {there}). Start 'jaxengine worker' there with the leader's flags and "
        "its --node-rank, and see what it says; a firewall must let both ports through"
    )


def _accept(
    listener: socket.socket, config: EngineConfig, facts: Facts, key: bytes
) -> Follower | None:
    """Let in the next process that knows the key, if there is one.

    Raises:
        HostsError: If it runs something else; it is told, too.
    """
    try:
        connection, address = listener.accept()
    except TimeoutError:
        return None
    try:
        authenticate_server(connection, key)
        channel = Channel(connection, SILENCE_S)
        hello = channel.receive().values
        host = f"{hello['host']} {address[0]}"
        follower = Follower(int(hello["rank"]), host, int(hello["pid"]), channel)
    except (ConnectionError, ValueError, KeyError):
        connection.close()
        return None  # a port scanner, or a follower with another key, which has told its user
    if difference := describe_difference(facts, hello["facts"]):
        reason = f"{follower} does not run what the leader runs: {difference}. Make them equal"
        channel.send(Frame("refused", {"reason": reason}))
        channel.close()
        raise HostsError(reason)
    return follower


def _check_rank(follower: Follower, config: EngineConfig, others: dict[int, Follower]) -> None:
    reason = None
    if not 1 <= follower.rank < config.nnodes:
        reason = f"{follower} is not one of nodes 1 to {config.nnodes - 1}: change its --node-rank"
    elif follower.rank in others:
        reason = (
            f"{follower} has the --node-rank of {others[follower.rank]}: give it a number of its "
            "own"
        )
    if reason is not None:
        follower.channel.send(Frame("refused", {"reason": reason}))
        follower.channel.close()
        raise HostsError(reason)


def join_leader(config: EngineConfig, facts: Facts, key: bytes) -> Channel:
    """Find the leader and wait until all have come (follower).

    Raises:
        HostsError: If it is not there in time, has another key, or refuses this process.
    """
    deadline = time.monotonic() + config.distributed_timeout_seconds
    where = f"{config.master_addr} port {config.master_port + 1}"
    connection = _connect(config, deadline)
    try:
        # The leader may first have to give up on others who say nothing.
        patience = max(HANDSHAKE_TIMEOUT_S, deadline - time.monotonic())
        authenticate_client(connection, key, patience)
        channel = Channel(connection, config.distributed_timeout_seconds)
        values = {"rank": config.node_rank, "host": socket.gethostname(), "pid": os.getpid()}
        channel.send(Frame("hello", {**values, "facts": facts}))
        answer = channel.receive()
    except AuthenticationError as error:
        connection.close()
        raise HostsError(
            f"the leader at {where} did not prove the same key: {error}. Set {KEY_VARIABLE} to "
            "the same text on every host"
        ) from error
    except ChannelClosedError as error:
        connection.close()
        raise HostsError(f"the leader at {where} ended the start: {error}; see there") from error
    if answer.kind != "welcome":
        channel.close()
        raise HostsError(f"refused by the leader at {where}: {answer.values.get('reason')}")
    channel.set_timeout(SILENCE_S)
    return channel


def _connect(config: EngineConfig, deadline: float) -> socket.socket:
    address = (config.master_addr, config.master_port + 1)
    while True:
        try:
            return socket.create_connection(address, timeout=RETRY_S * 10)
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"the leader (node 0) is not at {address[0]} port {address[1]} after "
                    f"{config.distributed_timeout_seconds} s ({error}): start it, and check "
                    "master_addr, master_port and the firewall"
                ) from error
        time.sleep(RETRY_S)
