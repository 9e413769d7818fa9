"""What must be equal in all processes of an engine, and what differs if it is not."""

import dataclasses
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jaxengine
from jaxengine.config import EngineConfig

# Fields of EngineConfig that each host may set as it likes: where its copy of the model lies, how
# it reaches the leader, what it prints, and what only the leader uses.
OWN_FIELDS = frozenset(
    (
        *("model", "tokenizer", "revision", "node_rank", "master_addr", "master_port"),
        *("distributed_executor_backend", "distributed_timeout_seconds"),
        *("disable_log_stats", "generation_config", "max_logprobs", "skip_tokenizer_init"),
        *("hf_overrides", "load_format"),  # the model's config is compared after them
    )
)

Facts = dict[str, Any]


def collect_facts(config: EngineConfig, hf_config: Mapping[str, Any]) -> Facts:
    """Return all that the device programs of a process depend on, as JSON holds it.

    Args:
        config: Of this process.
        hf_config: The model's config.json.
    """
    facts: Facts = {
        "version of jaxengine": jaxengine.__version__,
        "version of jax": metadata.version("jax"),
        "version of jaxlib": metadata.version("jaxlib"),
        "dummy weights": config.load_format == "dummy",
    }
    for field in dataclasses.fields(config):
        if field.name not in OWN_FIELDS:
            facts[field.name] = getattr(config, field.name)
    facts.update({f"the model's {name}": value for name, value in hf_config.items()})
    return json.loads(json.dumps(facts, default=str))


def describe_difference(leader: Facts, follower: Facts) -> str | None:
    """Name the first facts that differ; None if all are equal."""
    names = sorted(leader.keys() | follower.keys())
    different = [name for name in names if leader.get(name) != follower.get(name)]
    if not different:
        return None
    shown = [
        f"{name} is {leader.get(name)!r:.80} on the leader and {follower.get(name)!r:.80} there"
        for name in different[:3]
    ]
    more = len(different) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
