"""The leader's side: sends each step to the followers, and notices when one of them is lost.

A collective whose partner has died may raise, hang for ever, or end the process, depending on the
transport. So nothing here relies on it: a thread for each follower watches its connection, and the
leader waits for results by asking whether they are there, and whether all hosts still are.
"""

import atexit
import contextlib
import faulthandler
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxengine.distributed.channel import ChannelClosedError
from jaxengine.distributed.frames import Frame
from jaxengine.distributed.heartbeat import HEARTBEAT, Heartbeat
from jaxengine.distributed.roll_call import Follower
from jaxengine.distributed.step_frames import encode_masks, encode_step
from jaxengine.engine.device.model_runner import RunnerHooks
from jaxengine.engine.device.step_inputs import StepInputs

POLL_S = 50e-6  # hidden behind the second step in flight, which the devices go on with
NOTICE_S = 2.0  # from a failed collective to the closed connection of the one that failed
PATIENCE_S = 5.0  # from a loss to the end of a process that hangs in a collective
FAREWELL_S = 5.0  # for the followers to end after the leader


class HostLostError(RuntimeError):
    """A process of the engine is gone, and the engine with it.

    Attributes:
        request_ids: The requests that were not finished.
    """

    def __init__(self, reason: str, request_ids: Sequence[str]) -> None:
        listed = ", ".join(request_ids) or "none"
        super().__init__(
            f"{reason}. The engine has ended, no request goes on; not finished: {listed}. Start "
            "all its processes again"
        )
        self.request_ids = list(request_ids)


class Leader:
    """Leads the followers through the steps of one engine.

    Args:
        followers: From ``gather_followers``.
        release: Called at the end.

    Attributes:
        unfinished_requests: Returns the ids of the requests that a loss would end.
    """

    def __init__(
        self, followers: Sequence[Follower], release: Callable[[], None] = lambda: None
    ) -> None:
        self.unfinished_requests: Callable[[], Sequence[str]] = list
        self._followers = list(followers)
        self._release = release
        self._inboxes: dict[int, queue.Queue[Frame]] = {f.rank: queue.Queue() for f in followers}
        self._loss: str | None = None
        self._is_closing = False
        # A step was sent, and it is not known yet whether it was launched here, too.
        self._is_launching = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, args=(follower,), daemon=True)
            for follower in followers
        ]
        for thread in self._threads:
            thread.start()
        self._heartbeat = Heartbeat([follower.channel for follower in followers])
        atexit.register(self._end_process)

    def hooks(self, replica: int = 0) -> RunnerHooks:
        """How a replica's runner takes the followers along."""
        return RunnerHooks(
            on_dispatch=functools.partial(self._send_step, replica),
            on_masks=self._send_masks,
            on_restore=functools.partial(self._send_restore, replica),
            wait=self.wait,
            agree_on_blocks=self._agree_on_blocks,
        )

    def wait_until_ready(self) -> None:
        """Wait until every follower has built its part.

        Raises:
            HostLostError: If one could not, with its error.
        """
        self._gather("ready")

    def check(self) -> None:
        """Raise if a follower is lost.

        Raises:
            HostLostError: Naming it, and the unfinished requests.
        """
        if self._loss is not None:
            self._is_launching = False
            raise HostLostError(self._loss, self.unfinished_requests())

    def wait(self, array: jax.Array) -> None:
        """Return when an array is there.

        Raises:
            HostLostError: If a follower is lost before.
        """
        self._is_launching = False
        while not array.is_ready():  # type: ignore[attr-defined]
            self.check()
            time.sleep(POLL_S)
        try:
            array.block_until_ready()
        except Exception:
            self._expect_loss()
            self._is_launching = True  # what has failed here may go on elsewhere
            raise

    @contextlib.contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """End the followers, too, if the block raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the followers, and wait for them."""
        if self._is_closing:
            return
        self._is_closing = True
        self._heartbeat.stop()
        self._send(Frame("shutdown"))
        for thread in self._threads:
            thread.join(FAREWELL_S)
        for follower in self._followers:
            follower.channel.close()
        self._release()

    def _end_process(self) -> None:
        self.close()
        if self._loss is not None:
            # Programs that wait for the lost host may keep jax from ending.
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)

    def _send_step(self, replica: int, inputs: StepInputs) -> None:
        self.check()
        self._is_launching = True
        self._send(encode_step(inputs, replica))

    def _send_masks(self, masks: np.ndarray) -> None:
        self.check()
        self._is_launching = True  # the forward runs everywhere, the sampler nowhere yet
        self._send(encode_masks(masks))

    def _send_restore(self, replica: int) -> None:
        """After an error: go on together if the devices are in step, else end together."""
        error = sys.exc_info()[1]
        if self._is_launching and error is not None:
            if isinstance(error, Exception):
                self._expect_loss()
            self._lose(f"a step has failed on the leader ({type(error).__name__}: {error})")
            self.check()
        self._send(Frame("restore", {"replica": replica}))

    def _send(self, frame: Frame) -> None:
        for follower in self._followers:
            with contextlib.suppress(ChannelClosedError):  # its thread notices, too
                follower.channel.send(frame)

    def _agree_on_blocks(self, num_blocks: int) -> int:
        """Return the KV blocks that every process has room for."""
        frames = self._gather("blocks")
        agreed = min(num_blocks, *(int(frame.values["num_blocks"]) for frame in frames))
        self._send(Frame("blocks", {"num_blocks": agreed}))
        return agreed

    def _gather(self, kind: str) -> list[Frame]:
        """Wait for a frame from every follower; they come in the order of the start."""
        frames = []
        for follower in self._followers:
            while True:
                self.check()
                with contextlib.suppress(queue.Empty):
                    frames.append(self._inboxes[follower.rank].get(timeout=0.1))
                    break
            if frames[-1].kind != kind:
                self._lose(f"{follower} has sent {frames[-1].kind!r} instead of {kind!r}")
                self.check()
        return frames

    def _watch(self, follower: Follower) -> None:
        """Receive from one follower until it is gone (a thread of its own)."""
        try:
            while True:
                frame = follower.channel.receive()
                if frame.kind == "failed":
                    self._lose(f"{follower} has failed: {frame.values.get('error')}")
                elif frame.kind != HEARTBEAT:
                    self._inboxes[follower.rank].put(frame)
        except (ChannelClosedError, ValueError) as error:
            if not self._is_closing:
                self._lose(f"{follower} is lost: {error}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._loss is not None:
                return
            self._loss = reason
        threading.Thread(target=self._end_if_hanging, daemon=True).start()

    def _expect_loss(self) -> None:
        """Something failed that fails when a host is lost: give its connection time to say so.

        Raises:
            HostLostError: If a host is lost.
        """
        deadline = time.monotonic() + NOTICE_S
        while self._loss is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self.check()

    def _end_if_hanging(self) -> None:
        """End the process if its main thread waits for what will never come."""
        time.sleep(PATIENCE_S)
        if self._is_launching:
            print(
                f"error: {HostLostError(self._loss or '', self.unfinished_requests())}; this "
                "process hangs in a collective and is ended",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
