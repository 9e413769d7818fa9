"""Which packed tokens score which prompt tokens, chunk by chunk."""

from typing import Any

import numpy as np
import pytest

from jaxengine.engine.sampling.logprobs import TokenLogprobs
from jaxengine.engine.sampling.prompt_scorer import (
    WHOLE_VOCABULARY,
    PromptScorer,
    PromptScores,
    is_scored,
    scoring_inputs,
)
from tests.engine.helpers import add, make_request, make_scheduler, schedule, update


class Recorder:
    """Stands for the compiled scorer: scores token t with t, and notes what it was asked."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.next_ids: list[int] = []

    def make_program(self, count: int) -> Any:
        self.counts.append(count)

        def program(params: Any, hidden: Any, next_ids: np.ndarray) -> TokenLogprobs:
            self.next_ids = next_ids.tolist()
            tokens = np.arange(len(next_ids))
            return TokenLogprobs(-tokens.astype(float), tokens, None, tokens[:, None])

        return program


def run(scorer: PromptScorer, step: Any, num_tokens: int = 8) -> TokenLogprobs:
    return scorer.score(scoring_inputs(step, num_tokens), {}, np.zeros((num_tokens, 4)))


def score(step: Any, num_tokens: int = 8) -> tuple[Recorder, dict[str, tuple[int, list[int]]]]:
    """Return the recorder, and request -> (first prompt index scored, packed tokens)."""
    recorder = Recorder()
    arrays = run(PromptScorer(recorder.make_program), step, num_tokens)
    on_host = PromptScores.of(step, arrays).on_host()
    return recorder, {c.request_id: (c.start, arrays.rank.tolist()) for c, arrays in on_host}


def test_a_whole_prompt_scores_each_token_but_the_first() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [10, 11, 12, 13], prompt_logprobs=0))
    recorder, chunks = score(schedule(scheduler))
    assert chunks == {"a": (1, [0, 1, 2])}
    assert recorder.next_ids == [11, 12, 13, 0, 0, 0, 0, 0]


def test_chunks_of_a_prompt_follow_each_other_without_a_gap() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    add(scheduler, make_request("a", [10, 11, 12, 13, 14, 15, 16], prompt_logprobs=0))
    found = []
    for _ in range(3):
        step = schedule(scheduler)
        if any(map(is_scored, step.rows)):
            recorder, chunks = score(step)
            found.append((*chunks["a"], recorder.next_ids[:3]))
        update(scheduler, step)
    # The last step holds only the prompt's last token, which scores nothing.
    assert found == [(1, [0, 1, 2], [11, 12, 13]), (4, [0, 1, 2], [14, 15, 16])]


def test_only_rows_that_ask_are_scored_wherever_they_lie_in_the_step() -> None:
    scheduler = make_scheduler()
    add(
        scheduler,
        make_request("silent", [20, 21, 22]),
        make_request("single", [30], prompt_logprobs=2),
        make_request("asks", [40, 41, 42], prompt_logprobs=2),
    )
    recorder, chunks = score(schedule(scheduler))
    # Packed: 30 | 20 21 22 | 40 41 42. A prompt of one token has nothing to score.
    assert chunks == {"asks": (1, [4, 5])}
    assert recorder.next_ids == [0, 0, 0, 0, 41, 42, 0, 0]


def test_decoding_is_not_scored() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [10, 11, 12], prompt_logprobs=0))
    update(scheduler, schedule(scheduler))
    assert not any(map(is_scored, schedule(scheduler).rows))


@pytest.mark.parametrize(
    ("wanted", "count"),
    [((0,), 0), ((1,), 5), ((0, 5), 5), ((6, 2), 20), ((30, 1), 30), ((3, -1), WHOLE_VOCABULARY)],
)
def test_one_program_serves_the_largest_number_asked_for(
    wanted: tuple[int, ...], count: int
) -> None:
    scheduler = make_scheduler()
    for index, number in enumerate(wanted):
        add(scheduler, make_request(str(index), [10, 11], prompt_logprobs=number))
    recorder, _ = score(schedule(scheduler))
    assert recorder.counts == [count]


def test_a_program_is_made_once_for_each_number() -> None:
    recorder = Recorder()
    scorer = PromptScorer(recorder.make_program)
    scheduler = make_scheduler(max_num_batched_tokens=3)
    add(scheduler, make_request("a", list(range(9)), prompt_logprobs=3))
    for _ in range(2):
        step = schedule(scheduler)
        run(scorer, step)
        update(scheduler, step)
    assert recorder.counts == [5]
