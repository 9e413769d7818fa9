"""What a step brought, as it leaves the engine: numbers and numpy arrays, nothing of a device.

It can be sent to another process, or read here without waiting for anything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput


class LogprobRows(NamedTuple):
    """Logprobs of one token a row, and of the most likely ones.

    Attributes:
        logprob: [R] of the row's token.
        rank: [R] int32, 1 + number of tokens that are strictly more likely.
        top_ids: [R, k] int32, most likely first; None if the logprobs are those of the whole
            vocabulary.
        top_logprobs: [R, k], or [R, V] in the order of the ids.
        id_logprobs: [R, n] of the ids asked for; None if there are none.
    """

    logprob: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray
    id_logprobs: np.ndarray | None = None

    @classmethod
    def of(cls, arrays: Iterable[np.ndarray | None], rows: slice | Sequence[int]) -> "LogprobRows":
        """Take some rows of a step's arrays, which come in the order of the fields."""
        return cls(*(None if each is None else np.asarray(each)[rows] for each in arrays))  # type: ignore[arg-type]


@dataclass(slots=True)
class PromptLogprobs:
    """Logprobs of consecutive tokens of one prompt.

    Attributes:
        request_id: Whose prompt.
        start: Index in the prompt of the token that row 0 scores; at least 1.
        rows: One a token.
    """

    request_id: str
    start: int
    rows: LogprobRows


@dataclass(slots=True)
class StepNews:
    """What one call of ``Engine.step`` brought.

    Attributes:
        outputs: News of requests, in the order of the step's rows.
        prompt_logprobs: Parts of prompts that were scored. They come before the first output of
            their request, or together with it.
    """

    outputs: list[EngineCoreOutput] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
