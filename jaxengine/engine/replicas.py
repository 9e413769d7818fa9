"""Data parallelism: several replicas of a model behind the interface of one Engine.

Each replica is a whole engine on devices of its own, with its own scheduler and KV cache; none
knows of the others. ReplicaGroup gives each request to one of them and steps them all from one
thread, so it must never wait for one replica while another has a result or nothing to do.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence

import jax

from jaxengine.config import EngineConfig
from jaxengine.engine.build import build_engine
from jaxengine.engine.device.model_runner import RunnerHooks
from jaxengine.engine.engine import Engine
from jaxengine.engine.replica_router import ReplicaRouter
from jaxengine.engine.scheduling.request import Request
from jaxengine.engine.scheduling.scheduler_output import SchedulerStats
from jaxengine.engine.start_report import Startup
from jaxengine.engine.step_news import StepNews
from jaxengine.model_config import ModelConfig
from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.constraint import TokenConstraint
from jaxengine.weights import Checkpoint

POLL_S = 50e-6  # hidden behind the second step in flight, which the device goes on with
PATIENCE_S = 5.0  # then ``read`` is to say whether a step will ever be done


class ReplicaGroup:
    """Replicas of a model, used like one Engine.

    Args:
        replicas: Equal but for their devices; at least one.
    """

    def __init__(self, replicas: Sequence[Engine]) -> None:
        self.replicas = tuple(replicas)
        self._router = ReplicaRouter(len(replicas))
        # The one that was read longest ago comes first, so none is passed over for ever.
        self._reading_order = list(replicas)

    @property
    def model_config(self) -> ModelConfig:
        """The model served."""
        return self.replicas[0].model_config

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output."""
        return self.replicas[0].eos_token_ids

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs, or a step is in flight."""
        return any(replica.has_unfinished_requests for replica in self.replicas)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        constraint: TokenConstraint | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a request at the replica with the fewest unfinished tokens.

        Raises:
            ValueError: As ``Engine.add_request``.
        """
        number = self._router.find(request_id)
        if number is None:  # else the name is in use, which its replica will say
            number = self._router.choose()
        request = self.replicas[number].add_request(
            request_id,
            prompt_token_ids,
            params,
            arrival_time=arrival_time,
            priority=priority,
            constraint=constraint,
            cache_salt=cache_salt,
        )
        self._router.place(request_id, number, request.max_num_tokens)
        return request

    def abort(self, request_id: str) -> None:
        """End a request at once; its tokens in flight are dropped."""
        if (number := self._router.remove(request_id)) is not None:
            self.replicas[number].abort(request_id)

    def finish(self, request_id: str, stop_reason: int | str | None) -> None:
        """End a request because its text holds a stop string."""
        if (number := self._router.remove(request_id)) is not None:
            self.replicas[number].finish(request_id, stop_reason)

    def step(self) -> StepNews:
        """Dispatch what each replica can run, then take in one finished step of one of them.

        If a device fails, or the user interrupts, every request of every replica ends, the error
        goes on to the caller, and the group can be used again.
        """
        try:
            for replica in self._reading_order:
                replica.dispatch()
            chosen = self._wait_for_any()
            if chosen is None:
                return StepNews()
            step, token_ids = chosen.read()
        except BaseException:
            self._give_up_steps()
            raise
        self._reading_order.remove(chosen)
        self._reading_order.append(chosen)
        news = chosen.take_in(step, token_ids)
        self._router.record(news.outputs)
        return news

    def _wait_for_any(self) -> Engine | None:
        """Return a replica whose oldest step is done; None if no step is in flight.

        If all of them take very long, it returns one whose step is not done.
        """
        busy = [replica for replica in self._reading_order if replica.has_pending_steps]
        if len(busy) <= 1:  # there is nobody else to serve: ``read`` may wait
            return busy[0] if busy else None
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for replica in busy:
                if replica.is_ready:
                    return replica
            time.sleep(POLL_S)
        return busy[0]

    def _give_up_steps(self) -> None:
        self._router.clear()
        with contextlib.ExitStack() as stack:  # calls all of them, even if one raises
            for replica in self.replicas:
                stack.callback(replica.give_up_steps)

    def stats(self) -> SchedulerStats:
        """Counters of all replicas together."""
        return sum_stats([replica.stats() for replica in self.replicas])

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, with nothing changed, if requests still run."""
        if self.stats().num_held_blocks:
            return False
        return all([replica.reset_prefix_cache() for replica in self.replicas])


def sum_stats(stats: Sequence[SchedulerStats]) -> SchedulerStats:
    """Add up counters.

    ``kv_waste`` is weighted by the blocks held; ``kv_waste_average`` is the plain mean of those
    that have one, as the router gives replicas about the same number of tokens.
    """
    num_held_blocks = sum(each.num_held_blocks for each in stats)
    averages = [each.kv_waste_average for each in stats if each.kv_waste_average]
    return SchedulerStats(
        num_running=sum(each.num_running for each in stats),
        num_waiting=sum(each.num_waiting for each in stats),
        num_held_blocks=num_held_blocks,
        num_usable_blocks=sum(each.num_usable_blocks for each in stats),
        kv_waste=sum(e.kv_waste * e.num_held_blocks for e in stats) / max(1, num_held_blocks),
        kv_waste_average=sum(averages) / max(1, len(averages)),
        prefix_cache_queries=sum(each.prefix_cache_queries for each in stats),
        prefix_cache_hits=sum(each.prefix_cache_hits for each in stats),
        num_preemptions=sum(each.num_preemptions for each in stats),
    )


def build_replicas(
    config: EngineConfig,
    checkpoint: Checkpoint,
    eos_token_ids: frozenset[int],
    hooks_of: Callable[[int], RunnerHooks] = lambda _: RunnerHooks(),
) -> tuple[Engine | ReplicaGroup, list[Startup]]:
    """Build ``data_parallel_size`` replicas, one after the other.

    Args:
        config: What the user asked for.
        checkpoint: From ``open_model``.
        eos_token_ids: Tokens that end a request.
        hooks_of: For what drives the runners of other hosts, by the replica's number.

    Returns:
        The engine itself if there is one, else their group; and what each start did.

    Raises:
        ValueError: As ``build_engine``; also if there are too few devices.
    """
    if config.data_parallel_size == 1:
        engine, startup = build_engine(config, checkpoint, eos_token_ids, hooks=hooks_of(0))
        return engine, [startup]
    replicas, startups = [], []
    for number, devices in enumerate(
        split_devices(config, order_by_replica(config, jax.devices()))
    ):
        engine, startup = build_engine(config, checkpoint, eos_token_ids, devices, hooks_of(number))
        replicas.append(engine)
        startups.append(startup)
    return ReplicaGroup(replicas), startups


def order_by_replica(config: EngineConfig, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """Order the devices of several hosts so that every replica has an equal share of each host.

    The first host's process reads the tokens of all replicas, so none may be without it.

    Raises:
        ValueError: If a host's devices do not divide.
    """
    if config.nnodes == 1:
        return devices
    num_replicas = config.data_parallel_size
    size = config.tensor_parallel_size * config.pipeline_parallel_size
    used = devices[: size * num_replicas]
    hosts = [list(own) for _, own in itertools.groupby(used, key=lambda d: d.process_index)]
    for own in hosts:
        if len(own) % num_replicas:
            raise ValueError(
                f"data_parallel_size {num_replicas} does not divide the {len(own)} devices of node "
                f"{own[0].process_index} evenly, and every replica needs a share of each node: "
                "change it, or run an engine on each host"
            )
    shares = [(own, len(own) // num_replicas) for own in hosts]
    return [
        device
        for replica in range(num_replicas)
        for own, count in shares
        for device in own[replica * count : (replica + 1) * count]
    ]


def split_devices(config: EngineConfig, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Return the devices of each replica: neighbours, in order.

    Raises:
        ValueError: If there are too few, with the sizes that fit.
    """
    tp, pp, dp = (
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
        config.data_parallel_size,
    )
    size = tp * pp
    if size * dp > len(devices):
        most = len(devices) // size
        remedy = f"use a data_parallel_size of at most {most}"
        if not most:
            remedy = "lower tensor_parallel_size or pipeline_parallel_size: one replica has no room"
        raise ValueError(
            f"tensor_parallel_size {tp} x pipeline_parallel_size {pp} x data_parallel_size {dp} "
            f"needs {size * dp} devices but there are {len(devices)}: {remedy}"
        )
    return [list(devices[first : first + size]) for first in range(0, size * dp, size)]


def startup_text(startups: Sequence[Startup]) -> str:
    """The report of the start; of several replicas, the one with the smallest KV cache."""
    smallest = min(startups, key=lambda startup: startup.budget.num_blocks)
    if len(startups) == 1:
        return smallest.text()
    return f"{len(startups)} replicas, each with at least:\n{smallest.text()}"
