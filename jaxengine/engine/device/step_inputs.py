"""StepInputs: all that the host sends to the devices for one step.

Plain numbers and numpy arrays: equal inputs give equal device programs in every process that
holds a part of the model, which is how several hosts follow one scheduler.
"""

import dataclasses

import numpy as np

from jaxengine.batch import StepShape
from jaxengine.engine.device.batch_builder import TableUpdates
from jaxengine.engine.sampling.sampling_inputs import SamplerVariant


@dataclasses.dataclass(frozen=True)
class ScoringInputs:
    """What scores a step's prompt tokens.

    Attributes:
        num_logprobs: Top logprobs a token; -1 is the whole vocabulary.
        next_ids: [T] int32, the token behind each packed token.
    """

    num_logprobs: int
    next_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """One step, as the devices need it.

    Attributes:
        shape: Padded sizes: which program.
        packed: The int32 vector of ``jaxengine.batch``.
        table_updates: Block-table entries that did not fit into it; None if all did.
        variant: Static description of the sampling.
        sampling: The sampler's int32 vector.
        scoring: None if no prompt is scored.
        token_targets: [B] int32, slot that takes each row's sampled token; past the end for none.
        num_token_stores: How many of the steps whose tokens the first stage does not hold yet
            must be stored there before this one starts, oldest first.
    """

    shape: StepShape
    packed: np.ndarray
    table_updates: TableUpdates | None
    variant: SamplerVariant
    sampling: np.ndarray
    scoring: ScoringInputs | None
    token_targets: np.ndarray
    num_token_stores: int
