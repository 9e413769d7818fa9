"""Token ids of a fake engine in, RequestOutputs out. The tokenizer is bytes: id = byte."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxengine.engine.scheduling.request import FinishReason
from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput
from jaxengine.engine.step_news import LogprobRows, PromptLogprobs, StepNews
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.text.output_processor import OutputProcessor
from jaxengine.text.stop_strings import StopStrings
from jaxengine.text.tokenizer import Tokenizer

DELTA, CUMULATIVE, FINAL_ONLY = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def ids_of(text):
    return byte_tokenizer().encode(text)


def core(request_id, token_ids, finish=None, stop_reason=None, row=0):
    return EngineCoreOutput(request_id, list(token_ids), finish, stop_reason, 0, row)


class Session:
    """One request through a processor, token by token."""

    def __init__(self, **params):
        self.processor = OutputProcessor(byte_tokenizer(), clock=lambda: 5.0)
        self.params = SamplingParams(**{"max_tokens": None, **params})
        self.children = self.processor.add_request("r", "p", [1, 2], self.params)
        self.outputs = []
        self.stopped = []

    def feed(self, token_ids, finish=None, stop_reason=None, child="r", logprobs=None):
        output = core(child, token_ids, finish, stop_reason)
        output.logprobs = logprobs
        processed = self.processor.process(StepNews([output]))
        self.outputs += processed.request_outputs
        self.stopped += processed.stopped
        return processed

    def feed_text(self, text, finish=FinishReason.LENGTH):
        token_ids = ids_of(text)
        for token_id in token_ids[:-1]:
            self.feed([token_id])
        self.feed(token_ids[-1:], finish)

    @property
    def texts(self):
        return [output.outputs[0].text for output in self.outputs]

    @property
    def last(self):
        return self.outputs[-1].outputs[0]


# Output kinds.


def test_cumulative_outputs_hold_everything_so_far() -> None:
    session = Session(output_kind=CUMULATIVE)
    session.feed_text("aé")
    assert session.texts == ["a", "a", "aé"]
    assert [len(o.outputs[0].token_ids) for o in session.outputs] == [1, 2, 3]
    assert [o.finished for o in session.outputs] == [False, False, True]
    assert session.last.finish_reason == "length"


def test_deltas_hold_what_is_new() -> None:
    session = Session(output_kind=DELTA)
    session.feed_text("aéb")
    assert session.texts == ["a", "", "é", "b"]
    assert [o.outputs[0].token_ids for o in session.outputs] == [[i] for i in ids_of("aéb")]


def test_final_only_gives_one_output_at_the_end() -> None:
    session = Session(output_kind=FINAL_ONLY)
    session.feed_text("aéb")
    assert session.texts == ["aéb"]
    assert session.last.token_ids == ids_of("aéb")
    assert session.outputs[0].prompt == "p"
    assert session.outputs[0].prompt_token_ids == [1, 2]
    assert not session.processor.has_unfinished_requests


def test_outputs_given_before_do_not_change_afterwards() -> None:
    session = Session(output_kind=CUMULATIVE)
    session.feed(ids_of("a"))
    session.feed(ids_of("b"))
    assert session.outputs[0].outputs[0].token_ids == ids_of("a")


def test_without_detokenize_there_are_tokens_and_no_text() -> None:
    session = Session(detokenize=False)
    session.feed(ids_of("ab"), FinishReason.LENGTH)
    assert (session.last.text, session.last.token_ids) == ("", ids_of("ab"))


# The end.


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_the_text_of_a_stop_token_is_left_out_unless_included(kind, include, text) -> None:
    session = Session(output_kind=kind, include_stop_str_in_output=include)
    session.feed(ids_of("ab"))
    session.feed(ids_of("c"), FinishReason.STOP, stop_reason=ids_of("c")[0])
    assert "".join(session.texts if kind is DELTA else session.texts[-1:]) == text
    assert (session.last.finish_reason, session.last.stop_reason) == ("stop", ids_of("c")[0])
    assert session.stopped == []


@pytest.mark.parametrize(("include", "text"), [(False, "one"), (True, "one\n\n")])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_stop_string_over_several_tokens_cuts_the_text_and_stops_the_engine(
    kind, include, text
) -> None:
    session = Session(output_kind=kind, stop="\n\n", include_stop_str_in_output=include)
    session.feed_text("one\n\n", finish=None)
    assert "".join(session.texts if kind is DELTA else session.texts[-1:]) == text
    assert session.stopped == [("r", "\n\n")]
    assert (session.last.finish_reason, session.last.stop_reason) == ("stop", "\n\n")
    assert session.outputs[-1].finished
    assert session.feed(ids_of("late")).request_outputs == []


def test_a_stop_string_wins_over_the_length_and_need_not_be_told_to_the_engine() -> None:
    session = Session(stop=["END"])
    session.feed_text("the END", FinishReason.LENGTH)
    assert (session.last.text, session.last.finish_reason) == ("the ", "stop")
    assert session.stopped == []


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        (["cd", "bc"], "a", "bc"),  # complete before "cd" is
        (["bcd", "c"], "ab", "c"),  # complete before "bcd" is, though that one starts first
        (["bcd", "cd"], "a", "bcd"),  # complete at the same time: the first of the list
        (["cd", "bcd"], "ab", "cd"),
        (["d", "abcd"], "abc", "d"),
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_the_stop_string_that_is_complete_first_ends_the_text_however_long_a_token_is(
    stops, text, reason, size
) -> None:
    session = Session(stop=stops)
    for start in range(0, 4, size):
        if not session.stopped:
            session.feed(ids_of("abcd"[start : start + size]))
    assert (session.last.text, session.last.stop_reason) == (text, reason)


def test_stop_strings_are_ignored_up_to_min_tokens() -> None:
    session = Session(stop=["x"], min_tokens=3)
    session.feed_text("xxaxb", finish=None)
    assert session.last.text == "xxa"


def test_text_that_could_begin_a_stop_string_is_held_back() -> None:
    session = Session(output_kind=DELTA, stop=["abc"])
    session.feed_text("zabab-ab")
    assert session.texts == ["z", "", "", "ab", "", "ab-", "", "ab"]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\n", min_size=1, max_size=20),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 3), min_size=20, max_size=20),
    include=st.booleans(),
)
def test_streamed_text_equals_the_final_text_for_any_stop_strings(
    text, stops, sizes, include
) -> None:
    texts = {}
    for kind in (DELTA, FINAL_ONLY):
        session = Session(output_kind=kind, stop=stops, include_stop_str_in_output=include)
        position = 0
        for size in sizes:
            chunk = text[position : position + size]
            position += size
            is_last = position >= len(text)
            session.feed(ids_of(chunk), FinishReason.LENGTH if is_last else None)
            if is_last or (session.outputs and session.outputs[-1].finished):
                break
        texts[kind] = "".join(session.texts)
    assert texts[DELTA] == texts[FINAL_ONLY]
    found = [text.find(stop) for stop in stops if stop in text]
    if found and not include:
        assert len(texts[DELTA]) >= min(found)


def test_the_held_end_is_the_longest_beginning_of_a_stop_string() -> None:
    stops = StopStrings(["aab", "ba"])
    assert [stops.num_held_characters(t) for t in ("xaa", "xaab", "xa", "x", "")] == [2, 1, 1, 0, 0]


# n outputs.


def test_n_outputs_come_back_as_one_in_index_order() -> None:
    session = Session(n=3, seed=10, output_kind=FINAL_ONLY)
    assert [child.sampling_params.seed for child in session.children] == [10, 11, 12]
    assert all(child.sampling_params.n == 1 for child in session.children)
    for index in (2, 0, 1):
        session.feed(ids_of(str(index)), FinishReason.LENGTH, child=f"{index}_r")
    assert len(session.outputs) == 1
    assert [(o.index, o.text) for o in session.outputs[0].outputs] == [(0, "0"), (1, "1"), (2, "2")]


def test_deltas_of_n_outputs_hold_only_those_that_are_new() -> None:
    session = Session(n=2, output_kind=DELTA)
    session.feed(ids_of("b"), child="1_r")
    session.feed(ids_of("a"), FinishReason.LENGTH, child="0_r")
    session.feed(ids_of("c"), FinishReason.LENGTH, child="1_r")
    assert [[(c.index, c.text) for c in o.outputs] for o in session.outputs] == [
        [(1, "b")],
        [(0, "a")],
        [(1, "c")],
    ]
    assert [o.finished for o in session.outputs] == [False, False, True]


def test_abort_names_the_running_requests_of_the_engine() -> None:
    session = Session(n=2)
    session.feed(ids_of("a"), FinishReason.LENGTH, child="0_r")
    assert session.processor.abort("r") == ["1_r"]
    assert session.processor.abort("r") == []
    assert session.feed(ids_of("b"), child="1_r").request_outputs == []


def test_a_request_id_in_use_is_an_error() -> None:
    session = Session()
    with pytest.raises(ValueError, match="in use"):
        session.processor.add_request("r", None, [1], SamplingParams())


# Logprobs.


def arrays(rows, top=None):
    """LogprobRows from [(logprob, rank, [top ids], [top logprobs])]."""
    logprob, rank, ids, values = zip(*rows, strict=True)
    ids = None if top == -1 else np.array(ids)
    return LogprobRows(np.array(logprob), np.array(rank), ids, np.array(values))


def test_logprobs_hold_the_sampled_token_and_the_top_ones_asked_for() -> None:
    a, b, c = ids_of("abc")
    session = Session(logprobs=2, output_kind=FINAL_ONLY)
    session.feed([c], logprobs=arrays([(-3.0, 4, [a, b, c], [-0.5, -1.0, -3.0])]))
    step = arrays([(-0.25, 1, [a, b, c], [-0.25, -2.0, -3.0])])
    session.feed([a], FinishReason.LENGTH, logprobs=step)
    first, second = session.last.logprobs
    assert [(i, e.logprob, e.rank, e.decoded_token) for i, e in first.items()] == [
        (c, -3.0, 4, "c"),
        (a, -0.5, 1, "a"),
        (b, -1.0, 2, "b"),
    ]
    assert list(second) == [a, b]
    assert session.last.cumulative_logprob == -3.25


@pytest.mark.parametrize("detokenize", [True, False])
def test_decoded_tokens_join_to_the_text_and_are_none_without_detokenize(detokenize) -> None:
    session = Session(logprobs=0, output_kind=FINAL_ONLY, detokenize=detokenize)
    token_ids = ids_of("a😀b")
    for number, token_id in enumerate(token_ids, start=1):
        end = FinishReason.LENGTH if number == len(token_ids) else None
        session.feed([token_id], end, logprobs=arrays([(-1.0, 1, [], [])]))
    decoded = [
        entries[i].decoded_token
        for i, entries in zip(token_ids, session.last.logprobs, strict=True)
    ]
    assert decoded == (["a", "", "", "", "😀", "b"] if detokenize else [None] * 6)


def test_minus_one_logprobs_hold_the_whole_vocabulary_best_first() -> None:
    session = Session(logprobs=-1)
    step = arrays([(-2.0, 2, [0], [-3.0, -2.0, -1.0])], top=-1)
    session.feed([1], FinishReason.LENGTH, logprobs=step)
    assert {i: e.rank for i, e in session.last.logprobs[0].items()} == {1: 2, 2: 1, 0: 3}


def test_deltas_hold_the_logprobs_of_the_new_tokens_and_the_prompt_once() -> None:
    session = Session(logprobs=0, prompt_logprobs=0, output_kind=DELTA)
    step = arrays([(-1.0, 1, [], [])])
    scored = PromptLogprobs("r", 1, arrays([(-7.0, 3, [], [])]))
    session.processor.process(StepNews([], [scored]))
    session.feed([5], logprobs=step)
    session.feed([6], FinishReason.LENGTH, logprobs=step)
    assert [list(o.outputs[0].logprobs[0]) for o in session.outputs] == [[5], [6]]
    first, second = (o.prompt_logprobs for o in session.outputs)
    assert first[0] is None
    assert first[1][2].logprob == -7.0
    assert second is None


def test_metrics_hold_the_first_token_and_the_number_of_tokens() -> None:
    session = Session()
    session.feed_text("abc")
    metrics = session.outputs[-1].metrics
    assert (metrics.first_token_time, metrics.num_generation_tokens) == (5.0, 3)
    assert metrics.finished_time == 5.0
