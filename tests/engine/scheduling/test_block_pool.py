"""Tests of jaxengine.engine.scheduling.block_pool and block_hash."""

from array import array

import pytest

from jaxengine.engine.scheduling.block_hash import extend_block_hashes, root_hash
from jaxengine.engine.scheduling.block_pool import NULL_BLOCK_ID, BlockPool

HASH_A, HASH_B, HASH_C = b"a" * 32, b"b" * 32, b"c" * 32


def hashes(tokens: list[int], salt: str | None = None) -> list[bytes]:
    """Digests of the full blocks of 2 tokens."""
    chain: list[bytes] = []
    extend_block_hashes(chain, array("i", tokens), len(tokens) // 2, 2, root_hash(salt))
    return chain


def pool_with_cached(*block_hashes: bytes) -> BlockPool:
    """A pool of three usable blocks; blocks 1, 2, ... are cached, released in this order."""
    pool = BlockPool(num_blocks=4)
    block_ids = pool.allocate(len(block_hashes))
    assert block_ids is not None
    for block_id, block_hash in zip(block_ids, block_hashes, strict=True):
        pool.cache(block_id, block_hash)
    for block_id in block_ids:
        pool.release([block_id])
    return pool


def test_allocate_leaves_the_pool_unchanged_when_blocks_run_out() -> None:
    pool = BlockPool(num_blocks=4)  # three usable: block 0 is the null block
    assert pool.allocate(5) is None
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(num_blocks=4)
    assert NULL_BLOCK_ID not in (pool.allocate(3) or [])


def test_released_blocks_can_be_allocated_again() -> None:
    pool = BlockPool(num_blocks=4)
    block_ids = pool.allocate(3)
    assert block_ids is not None
    pool.release(block_ids)
    assert pool.num_free_blocks == 3
    assert sorted(pool.allocate(3) or []) == [1, 2, 3]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(num_blocks=4)
    block_ids = pool.allocate(1)
    assert block_ids is not None
    pool.cache(block_ids[0], HASH_A)
    pool.acquire(block_ids)
    pool.release(block_ids)
    assert pool.num_held_blocks == 1
    pool.release(block_ids)
    assert pool.num_held_blocks == 0


def test_releasing_a_block_too_often_is_noticed() -> None:
    pool = BlockPool(num_blocks=4)
    block_ids = pool.allocate(1)
    assert block_ids is not None
    pool.release(block_ids)
    with pytest.raises(AssertionError, match="block 1 was released too often"):
        pool.release(block_ids)


def test_a_cached_block_is_found_until_it_is_evicted() -> None:
    pool = pool_with_cached(HASH_A)
    assert pool.find_cached(HASH_A) == 1
    pool.allocate(3)
    assert pool.find_cached(HASH_A) is None


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = pool_with_cached(HASH_A, HASH_B)
    assert pool.allocate(1) == [3]


def test_the_cached_block_released_longest_ago_is_evicted_first() -> None:
    pool = pool_with_cached(HASH_A, HASH_B, HASH_C)
    pool.acquire([1])
    pool.release([1])  # used again, so it is now the newest
    assert pool.allocate(1) == [2]
    assert pool.allocate(2) == [3, 1]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = pool_with_cached(HASH_A, HASH_B, HASH_C)
    pool.acquire([1, 2, 3])
    pool.release([1, 2, 3])
    assert pool.allocate(2) == [3, 2]


def test_acquire_takes_a_cached_block_off_the_free_list() -> None:
    pool = pool_with_cached(HASH_A, HASH_B, HASH_C)
    pool.acquire([2])
    assert not pool.is_free(2)
    assert pool.allocate(3) is None
    assert pool.allocate(2) == [1, 3]
    assert pool.find_cached(HASH_B) == 2


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    pool = BlockPool(num_blocks=4)
    assert pool.allocate(2) == [1, 2]
    pool.cache(1, HASH_A)
    pool.cache(2, HASH_A)
    assert pool.find_cached(HASH_A) == 1
    pool.release([1, 2])
    pool.check_integrity([])


def test_reset_prefix_cache_forgets_all_content() -> None:
    pool = pool_with_cached(HASH_A, HASH_B)
    assert pool.reset_prefix_cache()
    assert pool.find_cached(HASH_A) is None
    pool.check_integrity([])


def test_reset_prefix_cache_changes_nothing_while_a_block_is_held() -> None:
    pool = pool_with_cached(HASH_A, HASH_B)
    pool.acquire([1])
    assert not pool.reset_prefix_cache()
    assert pool.find_cached(HASH_A) == 1
    assert pool.find_cached(HASH_B) == 2


def test_integrity_check_names_a_block_whose_count_is_wrong() -> None:
    pool = BlockPool(num_blocks=4)
    pool.allocate(2)
    pool.check_integrity([[1], [2]])
    with pytest.raises(AssertionError, match="block 2 has 1 references"):
        pool.check_integrity([[1]])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (4, 0)])
def test_a_pool_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        BlockPool(num_blocks, block_size)


def test_a_block_hash_depends_on_every_token_before_it() -> None:
    first, second = hashes([1, 2, 3, 4]), hashes([9, 2, 3, 4])
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert hashes([1, 2, 3, 5])[0] == first[0]


def test_a_block_hash_depends_on_the_salt() -> None:
    assert hashes([1, 2], salt="x") != hashes([1, 2])
    assert hashes([1, 2], salt="None") != hashes([1, 2], salt=None)


def test_hashes_can_be_extended_step_by_step() -> None:
    chain: list[bytes] = []
    tokens = array("i", [1, 2, 3, 4, 5, 6])
    for num_blocks in (1, 1, 3):
        extend_block_hashes(chain, tokens, num_blocks, 2, root_hash(None))
    assert chain == hashes([1, 2, 3, 4, 5, 6])
