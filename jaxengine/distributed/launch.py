"""The leader's start: what LLM calls before it touches a device."""

from collections.abc import Mapping
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.distributed.identity import collect_facts
from jaxengine.distributed.leader import Leader
from jaxengine.distributed.roll_call import cluster_key, gather_followers
from jaxengine.distributed.runtime import check_not_started, start_jax


def start_leader(config: EngineConfig, hf_config: Mapping[str, Any]) -> Leader:
    """Gather the followers, and join all devices.

    Args:
        config: The leader's.
        hf_config: The model's config.json.

    Raises:
        ValueError: If the flags are a follower's, or there is no key.
        HostsError: If a host does not come or runs something else.
    """
    if config.node_rank:
        raise ValueError(
            f"node_rank is {config.node_rank}: LLM(...) is the leader, node 0. Start the others "
            "with 'jaxengine worker'"
        )
    check_not_started()
    facts = collect_facts(config, hf_config)
    if config.distributed_executor_backend == "ray":
        from jaxengine.distributed.ray_cluster import gather_on_ray  # an optional package

        config, followers, release = gather_on_ray(config, facts)
        leader = Leader(followers, release)
    else:
        leader = Leader(gather_followers(config, facts, cluster_key()))
    with leader.closed_on_failure():
        start_jax(config)
    return leader
