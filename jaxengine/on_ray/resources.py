"""What a replica asks Ray for."""

from collections.abc import Mapping
from typing import Any

import ray

from jaxengine.config import EngineConfig

# Each of these multiplies the devices of a replica.
_PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def check_engine_arguments(engine_args: Mapping[str, Any]) -> None:
    """Find a mistake before a replica is started for it.

    Raises:
        ValueError: If an argument of ``LLM`` is not possible, or not on one host.
    """
    config = EngineConfig(**engine_args)
    if config.nnodes > 1:
        raise ValueError(
            f"nnodes is {config.nnodes}: a replica that Ray places lies within one host; use 1, "
            "or LLM without on_ray for a model that needs several hosts"
        )


def replica_resources(
    engine_args: Mapping[str, Any], num_cpus: float, num_gpus: float | None
) -> dict[str, float]:
    """Return the resources of one replica, in Ray's names.

    Args:
        engine_args: Arguments of ``LLM``.
        num_cpus: Processor cores.
        num_gpus: GPUs; None takes one for each device that the arguments name where the cluster
            has GPUs, else none.
    """
    if num_gpus is None:
        if not ray.is_initialized():
            ray.init()
        num_gpus = 0
        if ray.cluster_resources().get("GPU", 0):
            num_gpus = 1
            for name in _PARALLEL_SIZES:
                num_gpus *= engine_args.get(name, 1)
    return {"num_cpus": num_cpus, "num_gpus": num_gpus}
