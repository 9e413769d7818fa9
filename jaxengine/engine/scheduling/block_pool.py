"""The KV blocks of the engine: which are free, who shares them, what they hold.

Host state only. A block is in exactly one of three states::

    held     reference count > 0: in the block table of that many requests
    cached   reference count 0, content named by a digest: reusable until evicted
    empty    reference count 0, content of no interest

"Free" means cached or empty: ``allocate`` takes empty blocks first and then evicts the
cached one that was released longest ago.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK_ID = 0  # padding tokens write there, nobody reads it


class BlockPool:
    """Free list, reference counts and prefix cache of the KV blocks.

    Block 0 is ``NULL_BLOCK_ID`` and never handed out.

    Args:
        num_blocks: Blocks of the device's KV cache, block 0 included.
        block_size: Tokens of a block.
        enable_prefix_caching: Whether released blocks keep their content for others.

    Raises:
        ValueError: If there is not one usable block, or blocks hold no token.
    """

    def __init__(
        self, num_blocks: int, block_size: int = 16, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks is {num_blocks}, but block 0 is reserved, so at least 2 are needed; "
                f"raise --gpu-memory-utilization or --num-gpu-blocks-override"
            )
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, but must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, 0, -1))  # a stack: block 1 goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # released longest ago first
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: list[bytes | None] = [None] * num_blocks

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be handed out, free or not."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._empty) + len(self._cached)

    @property
    def num_held_blocks(self) -> int:
        """Blocks in the block table of at least one request."""
        return self.num_usable_blocks - self.num_free_blocks

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take free blocks: empty ones, then cached ones, least recently released first.

        Args:
            num_blocks: How many blocks, each of ``block_size`` tokens.

        Returns:
            The block ids, each with a reference count of 1; None, with the pool
            unchanged, if too few are free.
        """
        if num_blocks > len(self._empty) + len(self._cached):
            return None
        block_ids = [self._empty.pop() if self._empty else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def find_cached(self, block_hash: bytes) -> int | None:
        """Return the block of this content, held or free; None if there is none."""
        return self._block_of_hash.get(block_hash)

    def is_free(self, block_id: int) -> bool:
        """Whether nobody holds the block."""
        return self._ref_counts[block_id] == 0

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Add one holder to blocks that ``find_cached`` named."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Take one holder from each block; those without holders are free.

        The last block is counted as released first: of a cached prefix the end is
        evicted before the beginning, without which the end cannot be found.

        Args:
            block_ids: Blocks of one request, in the order of its tokens.
        """
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            assert self._ref_counts[block_id] == 0, f"block {block_id} was released too often"
            if self._hash_of_block[block_id] is None:
                self._empty.append(block_id)
            else:
                self._cached[block_id] = None

    def cache(self, block_id: int, block_hash: bytes) -> None:
        """Make the content of a held, full block findable.

        Where another block has the same content, that one stays the one that is found.
        """
        if block_hash not in self._block_of_hash and self._hash_of_block[block_id] is None:
            self._block_of_hash[block_hash] = block_id
            self._hash_of_block[block_id] = block_hash

    def reset_prefix_cache(self) -> bool:
        """Forget the content of all blocks, as after a change of weights.

        Returns:
            True; False, with nothing changed, while any block is held: its request would
            go on to name blocks after content that is no longer right.
        """
        if self.num_held_blocks:
            return False
        self._block_of_hash.clear()
        self._hash_of_block = [None] * self.num_blocks
        self._empty.extend(self._cached)
        self._cached.clear()
        return True

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Check that no block is lost or counted twice.

        Args:
            holders: The block ids of every request, null blocks left out. Without them
                only the pool's own lists are compared.

        Raises:
            AssertionError: Naming the block that is wrong.
        """
        free = [*self._empty, *self._cached]
        held = {i for i, count in enumerate(self._ref_counts) if count}
        _require(NULL_BLOCK_ID not in held and NULL_BLOCK_ID not in free, "null block was used")
        _require(len(free) == len(set(free)), "a block is free twice")
        _require(held.isdisjoint(free), "a block is held and free")
        _require(len(held) + len(free) == self.num_usable_blocks, "a block is lost")
        for block_hash, block_id in self._block_of_hash.items():
            _require(self._hash_of_block[block_id] == block_hash, f"hash of block {block_id}")
        for block_id in self._empty:
            _require(self._hash_of_block[block_id] is None, f"empty block {block_id} has a hash")
        for block_id in self._cached:
            _require(self._hash_of_block[block_id] is not None, f"block {block_id} has no hash")
        if holders is not None:
            counts = Counter(block_id for block_ids in holders for block_id in block_ids)
            for block_id, count in enumerate(self._ref_counts):
                _require(count == counts[block_id], f"block {block_id} has {count} references")

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of_block[block_id]
        assert block_hash is not None
        del self._block_of_hash[block_hash]
        self._hash_of_block[block_id] = None
        return block_id


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"block pool: {message}")
