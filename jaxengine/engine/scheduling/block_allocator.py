"""Which blocks a request holds: cached prefix, growth, sliding window, release."""

import sys

from jaxengine.engine.scheduling.block_hash import extend_block_hashes, root_hash
from jaxengine.engine.scheduling.block_pool import NULL_BLOCK_ID, BlockPool
from jaxengine.engine.scheduling.request import Request


class BlockAllocator:
    """Moves blocks between a pool and the block tables of requests.

    A request is admitted only if the blocks of all its known tokens are free, but takes
    them chunk by chunk. What it has not taken yet is reserved: counted here, so that the
    next admission does not promise the same blocks again.

    With a sliding window, blocks that no later token can see are "dead": they are
    released, and their place in ``block_ids`` becomes ``NULL_BLOCK_ID``.

    Args:
        block_pool: Where the blocks come from.
        max_chunk_tokens: Most tokens a request computes in one step.
        sliding_window: A token at position p sees (p - window, p], in every layer; None
            if any layer sees everything.
    """

    def __init__(
        self, block_pool: BlockPool, max_chunk_tokens: int, sliding_window: int | None = None
    ) -> None:
        self.block_pool = block_pool
        self.block_size = block_pool.block_size
        self.sliding_window = sliding_window
        self.num_reserved_blocks = 0
        self.num_unused_slots = 0  # in held blocks: token slots nothing was computed into
        self._max_window_blocks = sys.maxsize
        if sliding_window is not None:
            # One more than fit, as window and chunk begin anywhere in a block.
            self._max_window_blocks = 1 + self._num_blocks(sliding_window - 1 + max_chunk_tokens)

    @property
    def max_tokens_per_request(self) -> int:
        """Tokens whose K/V fit into the pool when a request has it alone."""
        if self._max_window_blocks <= self.block_pool.num_usable_blocks:
            return sys.maxsize  # what the window leaves behind is used again
        return self.block_pool.num_usable_blocks * self.block_size

    def find_cached_prefix(self, request: Request) -> list[int]:
        """Find the longest cached prefix that leaves at least one token to compute.

        Returns:
            Block ids from the first token on; dead blocks are ``NULL_BLOCK_ID``. Nothing
            is acquired yet.
        """
        if not self.block_pool.enable_prefix_caching or not request.reads_prefix_cache:
            return []
        num_blocks = (request.num_tokens - 1) // self.block_size
        self._extend_hashes(request, num_blocks)
        if self.sliding_window is not None:
            return self._find_cached_window(request, num_blocks)
        cached: list[int] = []
        for block_hash in request.block_hashes[:num_blocks]:
            block_id = self.block_pool.find_cached(block_hash)
            if block_id is None:
                break
            cached.append(block_id)
        return cached

    def can_admit(self, request: Request, cached: list[int], num_spare_blocks: int) -> bool:
        """Whether all known tokens fit beside what is reserved, with blocks to spare."""
        live = [block_id for block_id in cached if block_id != NULL_BLOCK_ID]
        num_taken = sum(map(self.block_pool.is_free, live))
        num_needed = self._num_peak_blocks(request, cached) - len(live) + num_taken
        return num_needed + num_spare_blocks <= self.num_unreserved_blocks

    @property
    def num_unreserved_blocks(self) -> int:
        """Free blocks not promised to an admitted request."""
        return self.block_pool.num_free_blocks - self.num_reserved_blocks

    def admit(self, request: Request, cached: list[int]) -> None:
        """Give a request its cached blocks and reserve the others; see ``can_admit``."""
        live = [block_id for block_id in cached if block_id != NULL_BLOCK_ID]
        self.block_pool.acquire(live)
        request.block_ids = cached
        request.num_dead_blocks = len(cached) - len(live)
        request.num_cacheable_blocks = len(cached)
        request.num_computed_tokens = len(cached) * self.block_size
        request.num_reserved_blocks = self._num_peak_blocks(request, cached) - len(live)
        self.num_reserved_blocks += request.num_reserved_blocks

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make a request's blocks hold ``num_tokens``.

        Returns:
            The blocks appended to ``block_ids``; None, with nothing appended, if too few
            are free.
        """
        if self.sliding_window is not None:
            self._release_dead_blocks(request)
        num_new = self._num_blocks(num_tokens) - len(request.block_ids)
        if num_new <= 0:
            return []
        new_block_ids = self.block_pool.allocate(num_new)
        if new_block_ids is None:
            return None
        request.block_ids += new_block_ids
        num_reserved = min(num_new, request.num_reserved_blocks)
        request.num_reserved_blocks -= num_reserved
        self.num_reserved_blocks -= num_reserved
        self.num_unused_slots += num_new * self.block_size
        return new_block_ids

    def cache_full_blocks(self, request: Request) -> None:
        """Offer the request's new full blocks to the prefix cache.

        Computed means dispatched here: K/V are written before anything that is scheduled
        later reads them, and within a step before attention reads. Placeholders are not
        known yet, so their block waits.
        """
        if not self.block_pool.enable_prefix_caching:
            return
        num_tokens = min(request.num_computed_tokens, len(request.all_token_ids))
        num_full = num_tokens // self.block_size
        if num_full <= request.num_cacheable_blocks:
            return
        self._extend_hashes(request, num_full)
        for index in range(request.num_cacheable_blocks, num_full):
            if request.block_ids[index] != NULL_BLOCK_ID:
                self.block_pool.cache(request.block_ids[index], request.block_hashes[index])
        request.num_cacheable_blocks = num_full

    def release(self, request: Request) -> None:
        """Take all blocks from a request; its computed tokens are gone, or cached."""
        self.cache_full_blocks(request)
        num_slots = len(request.block_ids) * self.block_size
        self.num_unused_slots -= num_slots - request.num_computed_tokens
        self.num_reserved_blocks -= request.num_reserved_blocks
        self.block_pool.release(request.block_ids[request.num_dead_blocks :])
        request.block_ids = []
        request.num_dead_blocks = 0
        request.num_reserved_blocks = 0
        request.num_cacheable_blocks = 0
        request.num_computed_tokens = 0

    def _release_dead_blocks(self, request: Request) -> None:
        first, end = request.num_dead_blocks, self._num_dead_blocks(request.num_computed_tokens)
        if end > first:
            self.cache_full_blocks(request)
            self.block_pool.release(request.block_ids[first:end])
            request.block_ids[first:end] = [NULL_BLOCK_ID] * (end - first)
            request.num_dead_blocks = end

    def _find_cached_window(self, request: Request, num_blocks: int) -> list[int]:
        """Find the longest prefix whose last window is cached; before it nobody looks."""
        assert self.sliding_window is not None
        num_needed = max(1, self._num_blocks(self.sliding_window - 1))
        run: list[int] = []  # backwards
        for index in reversed(range(num_blocks)):
            block_id = self.block_pool.find_cached(request.block_hashes[index])
            if block_id is None:
                run.clear()
                continue
            run.append(block_id)
            if len(run) == num_needed:
                return [NULL_BLOCK_ID] * index + run[::-1]
        return run[::-1]

    def _num_dead_blocks(self, num_computed_tokens: int) -> int:
        """Count the blocks that the next token, and so every later one, cannot see."""
        assert self.sliding_window is not None
        return max(0, num_computed_tokens - self.sliding_window + 1) // self.block_size

    def _num_peak_blocks(self, request: Request, cached: list[int]) -> int:
        """Count the live blocks a request holds at most until its known tokens are computed."""
        num_dead = cached.count(NULL_BLOCK_ID)
        return min(self._num_blocks(request.num_tokens) - num_dead, self._max_window_blocks)

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        if len(request.block_hashes) < num_blocks:
            extend_block_hashes(
                request.block_hashes,
                request.all_token_ids,
                num_blocks,
                self.block_size,
                root_hash(request.cache_salt),
            )

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
