"""Masks in the sampler, against masking in numpy: what is banned, and what is not touched."""

from array import array
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import SamplingParams
from jaxengine.engine.sampling.sampler import sample_packed
from jaxengine.engine.sampling.sampling_inputs import GREEDY, SamplingState

V = 70  # three words, the last one filled in part
NUM_SLOTS = 8
GREEDY_PARAMS = SamplingParams(temperature=0)
RANDOM = SamplingParams(temperature=1.0)


def make_row(slot: int, *, samples: bool = True) -> Any:
    request = SimpleNamespace(slot=slot, all_token_ids=array("i", [1, 2]), num_prompt_tokens=2)
    return SimpleNamespace(
        request=request, num_scheduled_tokens=1, num_computed_tokens=1, samples_token=samples
    )


def packed_masks(allowed: np.ndarray, num_masks: int) -> np.ndarray:
    """Boolean rows [n, V] as words: bit i % 32 of word i // 32."""
    masks = np.zeros((num_masks, -(-V // 32)), np.uint32)
    for row, column in zip(*np.nonzero(allowed), strict=True):
        masks[row, column // 32] |= np.uint32(1 << (column % 32))
    return masks.view(np.int32)


def run(
    logits: np.ndarray,
    params: list[SamplingParams],
    is_masked: list[bool],
    allowed: np.ndarray,
    end_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Sample once, row i in slot i; ``allowed`` has a row for each masked one."""
    state = SamplingState(NUM_SLOTS, V)
    for slot, each in enumerate(params):
        state.set_slot(slot, each, slot, [1], end_ids, is_masked=is_masked[slot])
    rows = [make_row(slot) for slot in range(len(params))]
    variant, layout, packed = state.build_rows(rows, len(rows))
    masks = packed_masks(allowed, variant.num_masks) if variant.num_masks else None
    last_tokens = jnp.zeros(NUM_SLOTS, jnp.int32)
    _, output = sample_packed(
        jnp.asarray(logits), packed, last_tokens, masks, layout=layout, variant=variant
    )
    return output.token_ids.tolist()


@pytest.mark.parametrize("params", [GREEDY_PARAMS, RANDOM, SamplingParams(top_p=0.9, top_k=7)])
def test_masked_rows_sample_what_banning_all_others_gives_and_the_rest_stay(
    params: SamplingParams,
) -> None:
    rng = np.random.default_rng(0)
    is_masked = [True, False, True, False, True, True]
    for _ in range(5):
        logits = rng.standard_normal((6, V)).astype(np.float32) * 3
        allowed = rng.random((4, V)) < 0.2
        allowed[:, 69] = True
        banned = logits.copy()
        banned[is_masked] = np.where(allowed, logits[is_masked], -np.inf)
        found = run(logits, [params] * 6, is_masked, allowed)
        assert found == run(banned, [params] * 6, [False] * 6, allowed)


def test_every_bit_of_a_mask_means_its_own_token() -> None:
    for token in range(V):
        allowed = np.arange(V)[None] == token
        assert run(np.zeros((1, V), np.float32), [GREEDY_PARAMS], [True], allowed) == [token]


def test_where_nothing_is_left_the_mask_alone_counts() -> None:
    logits = np.zeros((2, V), np.float32)
    logits[:, 9] = 5.0
    params = SamplingParams(temperature=0, min_tokens=3)
    allowed = np.isin(np.arange(V), [40])[None]
    # Row 0 may only end, which min_tokens forbids; row 1 has no mask.
    assert run(logits, [params, params], [True, False], allowed, frozenset([40])) == [40, 9]


def test_a_row_that_does_not_sample_has_no_mask() -> None:
    state = SamplingState(NUM_SLOTS, V)
    for slot in range(3):
        state.set_slot(slot, GREEDY_PARAMS, 0, is_masked=slot != 1)
    rows = [make_row(0, samples=False), make_row(1), make_row(2)]
    variant, layout, packed = state.build_rows(rows, 8)
    assert variant.num_masks == 4
    assert layout.views(packed)["mask_index"].tolist() == [4, 4, 0, 4, 4, 4, 4, 4]
    assert state.build_rows(rows[:2], 8)[0] == GREEDY


def test_a_slot_forgets_that_it_had_a_mask() -> None:
    state = SamplingState(NUM_SLOTS, V)
    state.set_slot(0, GREEDY_PARAMS, 0, is_masked=True)
    assert state.build_rows([make_row(0)], 1)[0].num_masks == 1
    state.set_slot(0, GREEDY_PARAMS, 0)
    assert state.build_rows([make_row(0)], 1)[0] == GREEDY


@pytest.mark.parametrize(
    ("num_masked", "num_rows", "expected"), [(1, 8, 4), (5, 64, 32), (300, 512, 512), (3, 3, 3)]
)
def test_masks_are_sent_for_a_few_numbers_of_rows(
    num_masked: int, num_rows: int, expected: int
) -> None:
    state = SamplingState(num_rows, V)
    for slot in range(num_masked):
        state.set_slot(slot, GREEDY_PARAMS, 0, is_masked=True)
    rows = [make_row(slot) for slot in range(num_masked)]
    assert state.build_rows(rows, num_rows)[0].num_masks == expected
