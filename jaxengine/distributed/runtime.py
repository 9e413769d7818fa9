"""jax over several processes: the start, and whether the flags use every host's devices."""

import jax

from jaxengine.config import EngineConfig
from jaxengine.distributed.roll_call import HostsError


def check_not_started() -> None:
    """Refuse a second engine of several hosts in one process.

    Raises:
        HostsError: If jax knows of several processes already.
    """
    if jax.distributed.is_initialized():
        raise HostsError(
            "this process is already part of an engine of several hosts: use one process for each"
        )


def start_jax(config: EngineConfig) -> None:
    """Join the processes' devices into one system, in which ``jax.devices()`` lists all.

    Raises:
        HostsError: If jax has touched a device before, or a host would have nothing to do.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Else jax ends this process, without an exception, some time after another one was lost.
    jax.config.update("jax_enable_recoverability", True)
    address = f"{_bracketed(config.master_addr)}:{config.master_port}"
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            coordinator_bind_address=address if config.node_rank == 0 else None,
            num_processes=config.nnodes,
            process_id=config.node_rank,
            cluster_detection_method="deactivate",
            initialization_timeout=config.distributed_timeout_seconds,
        )
    except RuntimeError as error:
        raise HostsError(f"jax could not join the {config.nnodes} hosts: {error}") from error
    check_devices(config, [device.process_index for device in jax.devices()])


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def check_devices(config: EngineConfig, processes: list[int]) -> None:
    """Check that every host has a device to contribute.

    Args:
        config: With the sizes.
        processes: The process of each device, as ``jax.devices()`` has them.

    Raises:
        HostsError: Naming the sizes and the devices.
    """
    tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
    needed = tensor * pipeline * config.data_parallel_size
    used = processes[:needed]
    idle = sorted(set(range(config.nnodes)) - set(used))
    if len(used) == needed and idle:
        raise HostsError(
            f"node {', '.join(map(str, idle))} of {config.nnodes} would have nothing to do: "
            f"tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} x "
            f"data_parallel_size {config.data_parallel_size} is {needed} devices, and the nodes "
            f"before have them. Use fewer nnodes, or larger sizes ({len(processes)} devices are "
            "there)"
        )
