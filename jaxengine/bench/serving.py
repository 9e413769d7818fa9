"""Sends requests to a server of OpenAI's kind, and times what comes back."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from tqdm import tqdm

from jaxengine.bench.report import PERCENTILES, statistics
from jaxengine.cli.remote import refusal
from jaxengine.cli.server_sent_events import EventReader, RemoteError

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass
class Timing:
    """What one request has taken, in seconds.

    Attributes:
        num_input: Prompt tokens, as the server has counted them.
        num_output: Generated ones, likewise.
        ttft: From sending to the first piece.
        itl: Between two pieces, each.
        e2el: From sending to the end.
        problem: Why it has failed; empty if it has not.
    """

    num_input: int = 0
    num_output: int = 0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    e2el: float = 0.0
    problem: str = ""

    @property
    def tpot(self) -> float | None:
        """Mean time of a token but the first; None if there is no other."""
        return (self.e2el - self.ttft) / (self.num_output - 1) if self.num_output > 1 else None


async def send_all(
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    arrivals: Sequence[float],
    *,
    headers: Mapping[str, str] | None = None,
    max_concurrency: int | None = None,
    show_progress: bool = True,
) -> tuple[list[Timing], float]:
    """Send each request at its time.

    Args:
        url: Of the endpoint.
        bodies: Of the requests, which must stream and include their usage.
        arrivals: Seconds after the start, rising, one a request.
        headers: Of every request.
        max_concurrency: Requests at a time; further ones wait here, and their time begins when they
            are sent.
        show_progress: Draw a bar.

    Returns:
        A timing a request, and the seconds from the start to the last end.
    """
    room = asyncio.Semaphore(max_concurrency or len(bodies))
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        with tqdm(total=len(bodies), desc="requests", disable=not show_progress) as bar:
            started = time.perf_counter()

            async def send_one(body: Mapping[str, Any], arrival: float) -> Timing:
                await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
                async with room:
                    timing = await time_request(client, url, body)
                bar.update()
                return timing

            pairs = zip(bodies, arrivals, strict=True)
            timings = await asyncio.gather(*(send_one(*pair) for pair in pairs))
            return timings, time.perf_counter() - started


async def time_request(client: httpx2.AsyncClient, url: str, body: Mapping[str, Any]) -> Timing:
    """Send one request and time its pieces; whatever fails is in ``problem``."""
    timing, events = Timing(), EventReader()
    started = last = time.perf_counter()
    try:
        async with client.stream("POST", url, json=body) as reply:
            if reply.status_code != 200:
                raise RemoteError(refusal(url, reply.status_code, await reply.aread()))
            async for piece in reply.aiter_bytes():
                for values in events.feed(piece):
                    usage = values.get("usage")
                    if usage:
                        timing.num_input = usage["prompt_tokens"]
                        timing.num_output = usage["completion_tokens"]
                    if not _has_output(values):
                        continue
                    now = time.perf_counter()
                    if timing.ttft:
                        timing.itl.append(now - last)
                    else:
                        timing.ttft = now - started
                    last = now
        timing.e2el = last - started
        if not events.is_done:
            raise RemoteError("the stream broke off before its end")
        if not timing.ttft:
            raise RemoteError("the stream held no output")
        if not timing.num_output:
            raise RemoteError("the stream held no usage: the server must know stream_options")
    except (RemoteError, httpx2.HTTPError, LookupError, TypeError) as error:
        timing.problem = str(error) or type(error).__name__
    return timing


def _has_output(values: Mapping[str, Any]) -> bool:
    """Whether an event brings a token; that of a chat which only names the role does not."""
    for choice in values.get("choices") or ():
        delta = choice.get("delta")
        if delta is None or (
            set(delta) - {"role"} and any(value for key, value in delta.items() if key != "role")
        ):
            return True
        if choice.get("finish_reason"):
            return True
    return False


def summarise(
    timings: Sequence[Timing],
    seconds: float,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the benchmark's numbers under vLLM's names.

    Args:
        timings: Of all requests.
        seconds: From the start to the last end.
        percentiles: Of each metric.
        goodput: Milliseconds that a request may take, by metric; counts those that keep all.
    """
    good = [each for each in timings if not each.problem]
    num_input, num_output = (sum(getattr(t, n) for t in good) for n in ("num_input", "num_output"))
    record: dict[str, Any] = {
        "duration": round(seconds, 4),
        "completed": len(good),
        "failed": len(timings) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": round(len(good) / seconds, 4),
        "output_throughput": round(num_output / seconds, 4),
        "total_token_throughput": round((num_input + num_output) / seconds, 4),
    }
    if goodput:
        kept = sum(_keeps(each, goodput) for each in good)
        record["request_goodput"] = round(kept / seconds, 4)
    found: dict[str, list[float]] = {
        "ttft": [each.ttft for each in good],
        "tpot": [each.tpot for each in good if each.tpot is not None],
        "itl": [gap for each in good for gap in each.itl],
        "e2el": [each.e2el for each in good],
    }
    for name in METRICS:
        record |= statistics(name, found[name], percentiles)
    return record


def _keeps(timing: Timing, limits: Mapping[str, float]) -> bool:
    values = {"ttft": timing.ttft, "tpot": timing.tpot or 0.0, "e2el": timing.e2el}
    return all(values[name] * 1e3 <= limit for name, limit in limits.items())
