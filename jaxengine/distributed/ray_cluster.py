"""Ray places the followers: an actor a host, while the process that made the LLM leads.

Ray decides where, and which GPUs an actor sees; all that happens afterwards is as without it.
"""

import dataclasses
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jaxengine.config import EngineConfig
from jaxengine.distributed.identity import Facts
from jaxengine.distributed.roll_call import KEY_VARIABLE, Follower, HostsError, gather_followers

# Settings of jax and the collectives that every process should have like the leader.
FORWARDED_PREFIXES = ("JAX_", "XLA_", "NCCL_")


class FollowerActor:
    """A process that Ray starts on another host."""

    def run(self, config: EngineConfig, key: str) -> None:
        """Follow until the leader ends."""
        from jaxengine.distributed.follower import run_follower  # jax reads its settings here

        os.environ[KEY_VARIABLE] = key
        run_follower(config)


def gather_on_ray(
    config: EngineConfig, facts: Facts
) -> tuple[EngineConfig, list[Follower], Callable[[], None]]:
    """Start a follower on each other host of the cluster, and gather them.

    Args:
        config: Of the leader.
        facts: What the followers must agree with.

    Returns:
        The config with the address and ports chosen, the followers, and what gives their place in
        the cluster back.

    Raises:
        HostsError: If the cluster has no room, or a follower does not come.
    """
    if not ray.is_initialized():
        ray.init()
    key = secrets.token_hex(32)
    address = ray.util.get_node_ip_address()
    config = dataclasses.replace(config, master_addr=address, master_port=free_port(address))
    group = _reserve(config, address)
    actors = [_start_actor(group, rank) for rank in range(1, config.nnodes)]

    def release() -> None:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)

    try:
        runs = [
            actor.run.remote(dataclasses.replace(config, node_rank=rank), key)
            for rank, actor in enumerate(actors, start=1)
        ]
        check = _check_of(runs)
        return config, gather_followers(config, facts, key.encode(), check), release
    except BaseException:
        release()
        raise


def free_port(address: str) -> int:
    """Return a port that is free on this host like the one after it."""
    for _ in range(100):
        with socket.create_server((address, 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server((address, port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port
    raise HostsError(f"no two neighbouring ports are free on {address}")


def _bundle(config: EngineConfig) -> dict[str, float]:
    """What one host's process takes of the cluster."""
    num_devices = (
        config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size
    )
    has_gpus = bool(ray.cluster_resources().get("GPU"))
    return {"CPU": 1.0, **({"GPU": -(-num_devices // config.nnodes)} if has_gpus else {})}


def _reserve(config: EngineConfig, address: str) -> PlacementGroup:
    """Reserve a bundle for each process; the first is the leader's, on its own host."""
    bundles = [_bundle(config) for _ in range(config.nnodes)]
    bundles[0][f"node:{address}"] = 0.001
    num_hosts = sum(node["Alive"] for node in ray.nodes())
    group = placement_group(bundles, strategy="STRICT_SPREAD" if num_hosts > 1 else "PACK")
    if group.wait(config.distributed_timeout_seconds):
        return group
    remove_placement_group(group)
    raise HostsError(
        f"Ray found no place for {config.nnodes} processes of {bundles[-1]}, one a host, within "
        f"{config.distributed_timeout_seconds} s. It has {num_hosts} hosts with "
        f"{ray.cluster_resources()} in all, and {ray.available_resources()} free: lower nnodes or "
        "the parallel sizes, or add hosts"
    )


def _start_actor(group: PlacementGroup, rank: int) -> Any:
    bundle = group.bundle_specs[rank]
    forwarded = {
        name: value for name, value in os.environ.items() if name.startswith(FORWARDED_PREFIXES)
    }
    return (
        ray.remote(FollowerActor)
        .options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,  # one that comes back has lost its place in the steps
            runtime_env={"env_vars": forwarded},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            ),
        )
        .remote()
    )


def _check_of(runs: Sequence[Any]) -> Callable[[], None]:
    """Return a function that raises if a follower has ended already."""

    def check() -> None:
        ended, _ = ray.wait(list(runs), timeout=0)
        for run in ended:
            rank = list(runs).index(run) + 1
            try:
                ray.get(run)
            except Exception as error:
                raise HostsError(f"node {rank}, started by Ray, has failed: {error}") from error

    return check
