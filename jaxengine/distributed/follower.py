"""The follower's side: runs the same device programs as the leader, step by step."""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Sequence

import jax

from jaxengine.config import EngineConfig
from jaxengine.distributed.channel import Channel, ChannelClosedError
from jaxengine.distributed.frames import Frame
from jaxengine.distributed.heartbeat import HEARTBEAT, Heartbeat
from jaxengine.distributed.identity import collect_facts
from jaxengine.distributed.roll_call import HostsError, cluster_key, join_leader
from jaxengine.distributed.runtime import check_not_started, start_jax
from jaxengine.distributed.step_frames import STEP, decode_masks, decode_step
from jaxengine.engine.build import build_runner
from jaxengine.engine.device.model_runner import ModelRunner, RunnerHooks
from jaxengine.engine.garbage_collection import exempt_from_garbage_collection
from jaxengine.engine.replicas import order_by_replica, split_devices
from jaxengine.process import prepare_process
from jaxengine.weights import Checkpoint, open_model


class LeaderLink:
    """The connection to the leader: a thread receives, so that its end is noticed at once.

    A main thread that waits for devices cannot be woken, so the process ends when the leader does.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._frames: queue.Queue[Frame] = queue.Queue()
        self._heartbeat = Heartbeat([channel])
        self._is_closed = False
        threading.Thread(target=self._receive, daemon=True).start()

    def send(self, frame: Frame) -> None:
        """Send a frame; if the leader is gone, the receiving thread notices."""
        with contextlib.suppress(ChannelClosedError):
            self._channel.send(frame)

    def receive(self) -> Frame:
        """Wait for the next frame."""
        return self._frames.get()

    def close(self) -> None:
        """End the connection."""
        self._is_closed = True
        self._heartbeat.stop()
        self._channel.close()

    def agree_on_blocks(self, num_blocks: int) -> int:
        """Tell how many KV blocks there is room for here; return how many all have."""
        self.send(Frame("blocks", {"num_blocks": num_blocks}))
        answer = self.receive()
        if answer.kind != "blocks":
            raise HostsError("the leader has ended during the start; see what it says")
        return int(answer.values["num_blocks"])

    def _receive(self) -> None:
        try:
            while True:
                frame = self._channel.receive()
                if frame.kind != HEARTBEAT:
                    self._frames.put(frame)
        except (ChannelClosedError, ValueError) as error:
            if not self._is_closed:
                print(
                    f"error: the leader is lost: {error}; this follower ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def run_follower(config: EngineConfig) -> None:
    """Take part in the engine of a leader until it ends.

    Args:
        config: As the leader's, but for ``node_rank`` and where the model lies.

    Raises:
        ValueError: If the flags are not a follower's, or the model cannot be loaded.
        HostsError: If the leader is not there or refuses this process.
    """
    if not config.node_rank:
        raise ValueError(
            f"node_rank is 0 of nnodes {config.nnodes}: that is the leader, which is made with "
            "LLM(...); a worker needs --nnodes and a --node-rank from 1 on"
        )
    check_not_started()
    prepare_process(config)
    checkpoint = open_model(config.model, config.load_format, config.revision, config.hf_overrides)
    facts = collect_facts(config, checkpoint.hf_config)
    link = LeaderLink(join_leader(config, facts, cluster_key()))
    try:
        start_jax(config)
        follow(link, _build_runners(config, checkpoint, link))
    except BaseException as error:
        link.send(Frame("failed", {"error": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        jax.distributed.shutdown()
        link.close()


def _build_runners(
    config: EngineConfig, checkpoint: Checkpoint, link: LeaderLink
) -> list[ModelRunner]:
    hooks = RunnerHooks(agree_on_blocks=link.agree_on_blocks)
    devices = split_devices(config, order_by_replica(config, jax.devices()))
    return [build_runner(config, checkpoint, own, hooks)[0] for own in devices]


def follow(link: LeaderLink, runners: Sequence[ModelRunner]) -> None:
    """Do what the leader says, until it says that it ends."""
    exempt_from_garbage_collection(owner=link)
    link.send(Frame("ready"))
    while (frame := link.receive()).kind != "shutdown":
        if frame.kind == STEP:
            replica, inputs = decode_step(frame)
            runners[replica].dispatch(inputs, lambda: decode_masks(link.receive()))
        elif frame.kind == "restore":
            runners[int(frame.values["replica"])].restore_state()
        else:
            raise ValueError(f"the leader has sent {frame.kind!r}, which is not known here")
