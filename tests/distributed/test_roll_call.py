"""The start names who did not come, and who runs something else."""

import concurrent.futures
import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from jaxengine.convert.overrides import override_config

from jaxengine.config import EngineConfig
from jaxengine.distributed.identity import collect_facts, describe_difference
from jaxengine.distributed.roll_call import (
    KEY_VARIABLE,
    HostsError,
    cluster_key,
    gather_followers,
    join_leader,
)
from jaxengine.distributed.runtime import check_devices
from tests.distributed.ports import free_ports

KEY = b"k" * 32
MODEL = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32}


def make_config(nnodes: int = 3, **fields: Any) -> EngineConfig:
    defaults = {"tensor_parallel_size": nnodes, "distributed_timeout_seconds": 10}
    return EngineConfig("a model", nnodes=nnodes, **{**defaults, **fields})


def roll_call(
    config: EngineConfig, *followers: EngineConfig, keys: tuple[bytes, ...] = ()
) -> list[Any]:
    """Run a leader and followers in threads; return the result or the error of each."""
    calls: list[Callable[[], Any]] = [
        lambda: gather_followers(config, collect_facts(config, MODEL), KEY)
    ]
    for number, own in enumerate(followers):
        key = keys[number] if keys else KEY
        calls.append(lambda o=own, k=key: join_leader(o, collect_facts(o, MODEL), k))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = [pool.submit(call) for call in calls]
        concurrent.futures.wait(futures)
    return [future.exception() or future.result() for future in futures]


def of_rank(config: EngineConfig, rank: int, **fields: Any) -> EngineConfig:
    return dataclasses.replace(config, node_rank=rank, **fields)


def test_all_come_in_any_order_with_paths_of_their_own() -> None:
    config = make_config(master_port=free_ports())
    followers, *channels = roll_call(
        config, of_rank(config, 2, model="elsewhere"), of_rank(config, 1, disable_log_stats=True)
    )
    assert [follower.rank for follower in followers] == [1, 2]
    assert socket.gethostname() in str(followers[0])
    for channel in [*channels, *(follower.channel for follower in followers)]:
        channel.close()


def test_another_config_is_refused_on_both_sides_with_the_difference() -> None:
    config = make_config(2, master_port=free_ports())
    errors = roll_call(config, of_rank(config, 1, max_num_seqs=8, seed=3))
    for error in errors:
        assert isinstance(error, HostsError)
        assert "max_num_seqs is None on the leader and 8 there" in str(error)
        assert "seed is 0 on the leader and 3 there" in str(error)
        assert "node 1" in str(error)


def test_a_host_that_does_not_come_is_named() -> None:
    config = make_config(master_port=free_ports(), distributed_timeout_seconds=2)
    leader, follower = roll_call(config, of_rank(config, 2))
    assert isinstance(leader, HostsError)
    assert "node 1 of 3 did not come to 127.0.0.1 port" in str(leader)
    assert f"others: node 2 ({socket.gethostname()} 127.0.0.1" in str(leader)
    assert isinstance(follower, HostsError)
    assert "ended the start" in str(follower)


def test_a_leader_that_does_not_come_is_named() -> None:
    config = make_config(2, master_port=free_ports(), distributed_timeout_seconds=1, node_rank=1)
    with pytest.raises(HostsError, match=r"the leader \(node 0\) is not at 127\.0\.0\.1 port"):
        join_leader(config, {}, KEY)


def test_a_follower_with_another_key_does_not_take_a_place() -> None:
    config = make_config(2, master_port=free_ports(), distributed_timeout_seconds=3)
    intruder, own = of_rank(config, 1), of_rank(config, 1)
    followers, wrong, channel = roll_call(config, intruder, own, keys=(b"w" * 32, KEY))
    assert isinstance(wrong, HostsError)
    assert KEY_VARIABLE in str(wrong) or "ended the start" in str(wrong) or "not at" in str(wrong)
    assert [follower.rank for follower in followers] == [1]
    channel.close()


def test_a_leader_with_another_key_is_refused() -> None:
    config = make_config(2, master_port=free_ports(), distributed_timeout_seconds=2)
    leader, follower = roll_call(config, of_rank(config, 1), keys=(b"w" * 32,))
    assert isinstance(leader, HostsError)
    assert "did not come" in str(leader)
    assert isinstance(follower, HostsError)
    assert KEY_VARIABLE in str(follower)


def test_two_followers_of_one_rank_are_refused() -> None:
    config = make_config(3, master_port=free_ports())
    leader, *_ = roll_call(config, of_rank(config, 1), of_rank(config, 1))
    assert isinstance(leader, HostsError)
    assert "a number of its own" in str(leader)


def test_connections_that_say_nothing_do_not_keep_the_others_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the leader gives each. The follower has to be more patient than that.
    monkeypatch.setattr("jaxengine.distributed.channel.HANDSHAKE_TIMEOUT_S", 2.0)
    config = make_config(2, master_port=free_ports(), distributed_timeout_seconds=60)

    def connect() -> socket.socket:
        while True:
            try:
                return socket.create_connection(("127.0.0.1", config.master_port + 1))
            except OSError:
                time.sleep(0.05)

    def follow() -> Any:
        with contextlib.ExitStack() as silent:
            for _ in range(3):
                silent.enter_context(connect())
            own = of_rank(config, 1)
            return join_leader(own, collect_facts(own, MODEL), KEY)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        follower = pool.submit(follow)
        (found,) = gather_followers(config, collect_facts(config, MODEL), KEY)
        follower.result().close()
    assert found.rank == 1


def test_waiting_ends_when_it_has_become_useless() -> None:
    config = make_config(2, master_port=free_ports())

    def check() -> None:
        raise HostsError("the other one has failed")

    with pytest.raises(HostsError, match="has failed"):
        gather_followers(config, {}, KEY, check)


def test_a_port_in_use_is_named() -> None:
    port = free_ports()
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        pytest.raises(HostsError, match=f"cannot listen on 127.0.0.1 port {port + 1}"),
    ):
        gather_followers(make_config(2, master_port=port), {}, KEY)


def test_another_model_or_version_is_a_difference() -> None:
    config = make_config(2)
    facts = collect_facts(config, MODEL)
    assert describe_difference(facts, collect_facts(config, dict(MODEL))) is None
    other = collect_facts(config, {**MODEL, "hidden_size": 64})
    assert "the model's hidden_size is 32 on the leader and 64" in str(
        describe_difference(facts, other)
    )
    assert "version of jax is" in str(describe_difference(facts, {**facts, "version of jax": "1"}))
    overridden = dataclasses.replace(config, hf_overrides={"hidden_size": 64})
    read = override_config(MODEL, overridden.hf_overrides)  # as a checkpoint is opened
    assert describe_difference(other, collect_facts(overridden, read)) is None


def test_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"has 0 characters.*openssl rand"):
        cluster_key()
    monkeypatch.setenv(KEY_VARIABLE, "x" * 16)
    assert cluster_key() == b"x" * 16


def test_a_host_without_a_share_is_refused() -> None:
    config = make_config(2, tensor_parallel_size=2)
    check_devices(config, [0, 1])
    with pytest.raises(HostsError, match="node 1 of 2 would have nothing to do"):
        check_devices(config, [0, 0, 1, 1])
