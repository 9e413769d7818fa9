"""Metrics of an engine, under vLLM's names. Standard library only."""

import dataclasses
from collections.abc import Mapping

from jaxengine.engine.scheduling.scheduler_output import SchedulerStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that Prometheus would read.

    Attributes:
        name: With the prefix "vllm:", so that dashboards made for it work.
        labels: What tells metrics of one name apart.
    """

    name: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gauge(Metric):
    """A number of this moment."""

    value: float


def metrics_of(
    stats: SchedulerStats, *, num_prompt_tokens: int, num_generation_tokens: int, model: str
) -> list[Metric]:
    """Return the metrics of this moment.

    Args:
        stats: Of the scheduler.
        num_prompt_tokens: Of the requests that have ended, from the start on.
        num_generation_tokens: Likewise.
        model: Name of the model, for the labels.
    """
    labels = {"model_name": model}
    gauges = {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage_perc": stats.kv_cache_usage,
    }
    counters = {
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "num_preemptions": stats.num_preemptions,
        "prompt_tokens": num_prompt_tokens,
        "generation_tokens": num_generation_tokens,
    }
    return [
        *(Gauge(name=f"vllm:{k}", labels=labels, value=float(v)) for k, v in gauges.items()),
        *(Counter(name=f"vllm:{k}", labels=labels, value=v) for k, v in counters.items()),
    ]
