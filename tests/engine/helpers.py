"""Small schedulers and requests, and a step without a device."""

from typing import Any

from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.request import Request
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput, SchedulerOutput
from jaxengine.sampling_params import SamplingParams

EOS = 99


def make_scheduler(
    num_blocks: int = 101, block_size: int = 4, enable_prefix_caching: bool = True, **limits: Any
) -> Scheduler:
    """A synchronous scheduler without a watermark, unless asked otherwise."""
    defaults: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
        "watermark": 0.0,
        "max_in_flight": 1,
    }
    pool = BlockPool(num_blocks, block_size, enable_prefix_caching)
    return Scheduler(block_pool=pool, **(defaults | limits))


def make_request(
    request_id: str,
    prompt: int | list[int] = 3,
    *,
    priority: int = 0,
    arrival_time: float = 0.0,
    cache_salt: str | None = None,
    **sampling: Any,
) -> Request:
    """A request; a number as prompt means that many tokens, different for each request."""
    if isinstance(prompt, int):
        prompt = [hash_name(request_id) + i for i in range(prompt)]
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(**({"max_tokens": 100, "temperature": 0.0} | sampling)),
        eos_token_ids=frozenset([EOS]),
        priority=priority,
        arrival_time=arrival_time,
        cache_salt=cache_salt,
    )


def hash_name(request_id: str) -> int:
    """A first token that no other short name has."""
    return 1000 * (1 + int.from_bytes(request_id.encode()) % 100_000)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add_request(request)


def schedule(scheduler: Scheduler) -> SchedulerOutput:
    """The next step, which must exist."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.check_integrity()
    return step


def update(scheduler: Scheduler, step: SchedulerOutput, token: int = 7) -> list[EngineCoreOutput]:
    """Return the same token for each row."""
    outputs = scheduler.update_from_output(step, [token] * len(step.rows))
    scheduler.check_integrity()
    return outputs


def run_step(scheduler: Scheduler, token: int = 7) -> SchedulerOutput:
    """Schedule a step and bring its tokens back."""
    step = schedule(scheduler)
    update(scheduler, step, token)
    return step


def scheduled_tokens(step: SchedulerOutput) -> dict[str, int]:
    """request_id -> tokens in this step."""
    return {row.request.request_id: row.num_scheduled_tokens for row in step.rows}
