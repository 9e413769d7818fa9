"""Times an ``LLM`` of this process: one batch again and again, or many requests at once."""

import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from jaxengine.bench.report import PERCENTILES, statistics
from jaxengine.bench.workload import RandomWorkload, random_prompts
from jaxengine.outputs import RequestMetrics, RequestOutput
from jaxengine.sampling_params import SamplingParams

WARM_UP_TOKENS = 4  # of each output, before the clock runs


def measure_latency(
    llm: Any,
    *,
    batch_size: int,
    input_len: int,
    params: SamplingParams,
    num_iters_warmup: int,
    num_iters: int,
    seed: int = 0,
    percentiles: Sequence[float] = PERCENTILES,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Run a batch ``num_iters`` times and return what it takes.

    Args:
        llm: The model.
        batch_size: Requests, all there at once.
        input_len: Tokens of each prompt; every iteration has its own.
        params: Of each request.
        num_iters_warmup: Iterations before the clock runs.
        num_iters: Iterations that count.
        seed: Of the prompts.
        percentiles: Of each metric.
        show_progress: Draw a bar.

    Returns:
        "latencies" in seconds, "avg_latency", and statistics of whole batches ("batch"), first
        tokens ("ttft") and the mean gap between a request's tokens ("tpot") in milliseconds.

    Raises:
        ValueError: If a number is not possible.
    """
    for flag, value, lowest in (
        *(("--batch-size", batch_size, 1), ("--input-len", input_len, 1)),
        *(("--num-iters", num_iters, 1), ("--num-iters-warmup", num_iters_warmup, 0)),
    ):
        if value < lowest:
            raise ValueError(f"{flag} is {value}: it must be at least {lowest}")
    total = num_iters_warmup + num_iters
    prompts = random_prompts([input_len] * (batch_size * total), vocab_size_of(llm), seed)
    seconds: list[float] = []
    metrics: list[RequestMetrics] = []
    for iteration in tqdm(range(total), desc="batches", disable=not show_progress):
        batch = prompts[iteration * batch_size : (iteration + 1) * batch_size]
        started = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        elapsed = time.perf_counter() - started
        if iteration >= num_iters_warmup:
            seconds.append(elapsed)
            metrics += [each.metrics for each in outputs]
    first = [each.first_token_latency or 0.0 for each in metrics]
    gaps = [time_per_output_token(each) for each in metrics if each.num_generation_tokens > 1]
    return {
        "avg_latency": sum(seconds) / num_iters,
        "latencies": seconds,
        **statistics("batch", seconds, percentiles),
        **statistics("ttft", first, percentiles),
        **statistics("tpot", gaps if params.n == 1 else [], percentiles),
    }


def time_per_output_token(metrics: RequestMetrics) -> float:
    """Return the mean gap between the tokens of a request, in seconds; the first has no gap."""
    first, last = metrics.first_token_time, metrics.last_token_time
    assert first is not None
    assert last is not None
    return (last - first) / (metrics.num_generation_tokens - 1)


def measure_throughput(
    llm: Any, workload: RandomWorkload, params: SamplingParams, *, show_progress: bool = True
) -> dict[str, Any]:
    """Generate for all requests of a workload in one call, and return how fast that was.

    Before the clock runs, the same requests run for a few tokens each, so that nothing is compiled
    in it.

    Args:
        llm: The model.
        workload: The requests.
        params: Of each request, but for its length.
        show_progress: Draw a bar.

    Returns:
        vLLM's "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second" and
        "tokens_per_second" (prompts and outputs), and "output_tokens_per_second".
    """
    drawn = workload.draw(range(vocab_size_of(llm)))
    prompts = [prompt for prompt, _ in drawn]
    lengths = [params.clone(max_tokens=num_output) for _, num_output in drawn]
    short = [params.clone(max_tokens=min(WARM_UP_TOKENS, num_output)) for _, num_output in drawn]
    llm.generate(prompts, short, use_tqdm=False)
    llm.reset_prefix_cache()  # the warm-up's prompts must not be found
    started = time.perf_counter()
    outputs: list[RequestOutput] = llm.generate(prompts, lengths, use_tqdm=show_progress)
    seconds = time.perf_counter() - started
    num_input = sum(len(each.prompt_token_ids) for each in outputs)
    num_output = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    return {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_num_tokens": num_input + num_output,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": (num_input + num_output) / seconds,
        "output_tokens_per_second": num_output / seconds,
    }


def vocab_size_of(llm: Any) -> int:
    """Return how many token ids a model has."""
    return int(llm.startup.model.vocab_size)
