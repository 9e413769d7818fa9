"""Metrics for Prometheus, under vLLM's names, and the line in the log every ten seconds.

Counters and histograms are what this process has seen; gauges are what the engine has said last.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from jaxengine.engine.scheduling.scheduler_output import SchedulerStats
from jaxengine.engine_client import EngineInfo, EngineNews
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams

logger = logging.getLogger("jaxengine.server")

LOG_INTERVAL_S = 10.0
disable_created_metrics()
MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
# Limits of the buckets, in seconds; those of vLLM.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of all requests.",
    "generation_tokens": "Generated tokens.",
    "prompt_tokens_cached": "Prompt tokens whose K/V came from the prefix cache.",
    "admission_rejections": "Requests refused because the queue is full.",
}
_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two tokens of a request.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean time of a token of a request.", _TOKEN_S),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _REQUEST_S),
    "request_queue_time_seconds": ("From arrival to the first step.", _REQUEST_S),
    "request_prefill_time_seconds": ("From the first step to the first token.", _REQUEST_S),
    "request_decode_time_seconds": ("From the first to the last token.", _REQUEST_S),
    "request_inference_time_seconds": ("From the first step to the last token.", _REQUEST_S),
    "iteration_tokens_total": ("Tokens that a step has brought.", _STEP_TOKENS),
}
_GAUGES = {
    "num_requests_running": ("num_running", "Requests that hold blocks."),
    "num_requests_waiting": ("num_waiting", "Requests that wait."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Fraction of the KV blocks in use."),
    "kv_cache_waste_perc": ("kv_waste", "Fraction of the slots in held blocks without a token."),
    "kv_cache_waste_average_perc": ("kv_waste_average", "The same over all steps so far."),
}
_ENGINE_COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the cache."),
    "num_preemptions": ("num_preemptions", "Requests that lost their blocks."),
}


def _length_buckets(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to the longest request, as vLLM has them."""

    def rising() -> Iterator[int]:
        scale = 1
        while scale <= longest:
            yield from (scale, 2 * scale, 5 * scale)
            scale *= 10

    return [each for each in rising() if each <= longest] or [1]


@dataclasses.dataclass
class _Progress:
    """What is known of a request that goes on."""

    num_tokens: int = 0
    last_time: float = 0.0


class Metrics:
    """Observes an AsyncLLM.

    Args:
        model: Its name in the labels.
        info: What the engine is.
    """

    def __init__(self, model: str, info: EngineInfo) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._progress: dict[str, _Progress] = {}
        self._stats: SchedulerStats | None = None
        self._engine_totals = dict.fromkeys(_ENGINE_COUNTERS, 0)
        self._logged = (time.monotonic(), 0, 0)
        self.num_prompt_tokens = self.num_generated_tokens = 0
        self._counters = {k: self._new(Counter, k, text) for k, text in _COUNTERS.items()}
        self._histograms = {
            k: self._new(Histogram, k, text, buckets=b) for k, (text, b) in _HISTOGRAMS.items()
        }
        lengths = _length_buckets(info.max_model_len)
        for name, text, buckets in (
            ("request_prompt_tokens", "Tokens of a prompt.", lengths),
            ("request_generation_tokens", "Tokens of an output.", lengths),
            ("request_params_max_tokens", "max_tokens of a request.", lengths),
            ("request_params_n", "n of a request.", [1, 2, 5, 10, 20]),
        ):
            self._histograms[name] = self._new(Histogram, name, text, buckets=buckets)
        self._gauges = {k: self._new_gauge(k, text) for k, (_, text) in _GAUGES.items()}
        self._engine_counters = {
            k: self._new(Counter, k, text) for k, (_, text) in _ENGINE_COUNTERS.items()
        }
        self._successes = Counter(
            "vllm:request_success",
            "Requests that have ended.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._describe_engine(info)

    def on_news(self, news: EngineNews) -> None:
        """Take in what the engine has brought."""
        if news.step.outputs:
            num_tokens = sum(len(output.new_token_ids) for output in news.step.outputs)
            self.num_generated_tokens += num_tokens
            self._counters["generation_tokens"].inc(num_tokens)
            self._histograms["iteration_tokens_total"].observe(num_tokens)
        if news.stats is not None:
            self._take_stats(news.stats)

    def on_output(self, output: RequestOutput, params: SamplingParams) -> None:
        """Take in what a request has got."""
        metrics = output.metrics
        if metrics is None or metrics.last_token_time is None:
            return
        progress = self._progress.get(output.request_id)
        if progress is None:
            progress = self._progress[output.request_id] = _Progress()
            self._begin(output)
        elif progress.last_time < metrics.last_token_time:
            gap = metrics.last_token_time - progress.last_time
            self._histograms["inter_token_latency_seconds"].observe(gap)
        progress.last_time = metrics.last_token_time
        if output.finished:
            self._end(output, params)

    def forget(self, request_id: str) -> None:
        """A request was aborted."""
        self._progress.pop(request_id, None)

    def count_rejection(self) -> None:
        """A request was refused because the queue is full."""
        self._counters["admission_rejections"].inc()

    def text(self) -> bytes:
        """Return everything in the format of Prometheus."""
        if MULTIPROCESS_DIRECTORY in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
            return generate_latest(registry)
        return generate_latest(self._registry)

    def log_line(self) -> str | None:
        """Return what has passed since the last line; None if nothing has."""
        now, (then, num_prompt, num_generated) = time.monotonic(), self._logged
        self._logged = (now, self.num_prompt_tokens, self.num_generated_tokens)
        stats, seconds = self._stats, max(now - then, 1e-6)
        is_idle = (num_prompt, num_generated) == self._logged[1:]
        if stats is None or (is_idle and not stats.num_running + stats.num_waiting):
            return None
        hits = stats.prefix_cache_hits / max(1, stats.prefix_cache_queries)
        return (
            f"Avg prompt throughput: {(self.num_prompt_tokens - num_prompt) / seconds:.1f} "
            f"tokens/s, Avg generation throughput: "
            f"{(self.num_generated_tokens - num_generated) / seconds:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"KV cache usage: {100 * stats.kv_cache_usage:.1f}%, waste: "
            f"{100 * stats.kv_waste:.1f}%, Prefix cache hit rate: {100 * hits:.1f}%"
        )

    def _new(self, kind: type, name: str, text: str, **options: Any) -> Any:
        metric = kind(f"vllm:{name}", text, list(self._labels), registry=self._registry, **options)
        return metric.labels(**self._labels)

    def _new_gauge(self, name: str, text: str) -> Any:
        return self._new(Gauge, name, text, multiprocess_mode="mostrecent")

    def _describe_engine(self, info: EngineInfo) -> None:
        cache = Gauge(
            "vllm:cache_config_info",
            "The KV cache.",
            [*self._labels, "block_size", "num_gpu_blocks", "kv_cache_size_tokens"],
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )
        num_tokens = info.num_blocks * info.block_size
        cache.labels(*self._labels.values(), info.block_size, info.num_blocks, num_tokens).set(1)
        for name, text, value in (
            (
                "compiled_programs",
                "Step programs compiled at the start.",
                len(info.compile_seconds),
            ),
            ("compile_seconds", "Seconds their compilation took.", sum(info.compile_seconds)),
            ("startup_seconds", "Seconds that the start took.", info.started_s),
        ):
            self._new_gauge(name, text).set(value)

    def _take_stats(self, stats: SchedulerStats) -> None:
        self._stats = stats
        for name, (field, _) in _GAUGES.items():
            self._gauges[name].set(getattr(stats, field))
        for name, (field, _) in _ENGINE_COUNTERS.items():
            total = getattr(stats, field)
            self._engine_counters[name].inc(max(0, total - self._engine_totals[name]))
            self._engine_totals[name] = total

    def _begin(self, output: RequestOutput) -> None:
        metrics = output.metrics
        assert metrics is not None
        num_prompt = len(output.prompt_token_ids)
        self.num_prompt_tokens += num_prompt
        self._counters["prompt_tokens"].inc(num_prompt)
        self._counters["prompt_tokens_cached"].inc(output.num_cached_tokens or 0)
        if metrics.first_token_time is not None:
            waited = metrics.first_token_time - metrics.arrival_time
            self._histograms["time_to_first_token_seconds"].observe(waited)

    def _end(self, output: RequestOutput, params: SamplingParams) -> None:
        metrics, observe = output.metrics, self._observe
        assert metrics is not None
        self._progress.pop(output.request_id, None)
        first, last = metrics.first_token_time, metrics.last_token_time
        assert first is not None
        assert last is not None
        observe("e2e_request_latency_seconds", last - metrics.arrival_time)
        observe("request_decode_time_seconds", last - first)
        if (scheduled := metrics.first_scheduled_time) is not None:
            observe("request_queue_time_seconds", scheduled - metrics.arrival_time)
            observe("request_prefill_time_seconds", first - scheduled)
            observe("request_inference_time_seconds", last - scheduled)
        num_generated = metrics.num_generation_tokens
        if num_generated > 1:
            mean = (last - first) / (num_generated - 1)
            observe("request_time_per_output_token_seconds", mean)
        observe("request_prompt_tokens", len(output.prompt_token_ids))
        observe("request_generation_tokens", num_generated)
        observe("request_params_n", params.n)
        if params.max_tokens is not None:
            observe("request_params_max_tokens", params.max_tokens)
        for completion in output.outputs:
            reason = completion.finish_reason or "abort"
            self._successes.labels(*self._labels.values(), reason).inc()

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(max(0.0, value))
