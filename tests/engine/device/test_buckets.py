import itertools

import pytest

from jaxengine.batch import StepShape
from jaxengine.engine.device.buckets import Buckets, decode_sizes, mixed_sizes


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> Buckets:
    return Buckets(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        min_mixed_tokens=min(16, max_num_batched_tokens),
    )


@pytest.mark.parametrize(("seqs", "tokens"), [(1, 1), (1, 7), (3, 17), (40, 64), (200, 300)])
def test_every_possible_step_has_a_shape_that_holds_it_and_is_compiled_at_start(
    seqs: int, tokens: int
) -> None:
    buckets = make_buckets(seqs, tokens)
    compiled = set(buckets.all_shapes())
    for num_tokens in range(1, tokens + 1):
        for num_rows in range(1, min(seqs, num_tokens) + 1):
            shape = buckets.choose(num_tokens, num_rows)
            assert shape in compiled
            assert shape.num_tokens >= num_tokens
            assert shape.num_rows >= num_rows
            assert shape.decode_only == (num_tokens == num_rows)


def test_a_step_takes_the_smallest_shape() -> None:
    buckets = make_buckets(8, 64)
    assert buckets.choose(3, 3) == StepShape(4, 4, decode_only=True)
    assert buckets.choose(9, 3) == StepShape(16, 8, decode_only=False)
    assert buckets.choose(17, 3) == StepShape(32, 8, decode_only=False)
    assert buckets.choose(64, 8) == StepShape(64, 8, decode_only=False)


def test_prefill_of_few_rows_does_not_pay_for_the_logits_of_many() -> None:
    buckets = make_buckets(256, 1024)
    assert buckets.choose(1024, 5).num_rows == 32
    assert buckets.choose(1024, 33).num_rows == 256


def test_the_largest_step_has_rows_to_choose_from() -> None:
    buckets = make_buckets(1024, 16384)
    assert buckets.choose(9000, 100) == StepShape(16384, 256, decode_only=False)
    assert buckets.choose(9000, 257) == StepShape(16384, 1024, decode_only=False)
    assert buckets.choose(8000, 100) == StepShape(8192, 1024, decode_only=False)


def test_sizes_that_it_pays_to_fill_are_those_whose_time_grows() -> None:
    assert make_buckets(256, 8192).fitted_tokens == [1024, 2048, 4096, 8192]
    assert make_buckets(64, 512).fitted_tokens == []


def test_the_first_shape_is_the_largest() -> None:
    shapes = make_buckets(256, 8192).all_shapes()
    assert shapes[0] == StepShape(8192, 256, decode_only=False)
    assert len(shapes) == len(set(shapes))


def test_sizes_grow_to_the_limit_and_end_with_it() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(5) == [1, 2, 4, 5]
    assert decode_sizes(8) == [1, 2, 4, 8]
    assert mixed_sizes(16, 16) == [16]
    assert mixed_sizes(16, 100) == [16, 32, 64, 100]


@pytest.mark.parametrize("seqs", [256, 1000, 1024])
def test_no_decode_step_is_padded_by_more_than_its_own_size(seqs: int) -> None:
    sizes = decode_sizes(seqs)
    assert sizes == sorted(set(sizes))
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))
