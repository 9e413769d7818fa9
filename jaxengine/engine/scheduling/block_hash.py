"""Names for the content of full KV blocks: a chain of digests.

The K/V of a block depend on its tokens and on every token before them, so a block is
named by the digest of its parent's name and its own tokens. Prompts come from users who
may want to hit another user's blocks, so the hash is a cryptographic one: BLAKE2b
(RFC 7693), 32 bytes, under a microsecond for a block of 16 tokens.
"""

from array import array
from hashlib import blake2b

DIGEST_BYTES = 32


def root_hash(*extra_keys: str | None) -> bytes:
    """Return the parent of a first block.

    Args:
        extra_keys: What besides the tokens decides the K/V or who may share them: the
            cache salt (an adapter's name takes another place here).
    """
    return blake2b(repr(extra_keys).encode(), digest_size=DIGEST_BYTES).digest()


def extend_block_hashes(
    block_hashes: list[bytes],
    token_ids: "array[int]",
    num_blocks: int,
    block_size: int,
    root: bytes,
) -> None:
    """Append digests until there are ``num_blocks``; those already there are kept.

    Args:
        block_hashes: The chain so far, changed in place.
        token_ids: Tokens of the request, at least ``num_blocks * block_size`` of them.
        num_blocks: How many leading blocks shall have a digest.
        block_size: Tokens of a block.
        root: Parent of the first block.
    """
    parent = block_hashes[-1] if block_hashes else root
    for start in range(len(block_hashes) * block_size, num_blocks * block_size, block_size):
        tokens = token_ids[start : start + block_size].tobytes()
        parent = blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()
        block_hashes.append(parent)
