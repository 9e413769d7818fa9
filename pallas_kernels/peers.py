"""Where the GPUs of a process write to each other: the memory, its addresses, the number of a call.

Data for the kernels of ``all_reduce_triton.py`` and for those who keep the memory.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Int

PARITIES = 2  # inboxes of even and of odd calls
SMALL_TILE = 512  # numbers of a program that sends packets
# A GPU sends an array in packets to each of the others, twice its bytes. Two H100: 128 rows of 4096
# take 9.0 us so, and 13.1 in tiles; 256 rows 15.6 and 13.7. XLA needs 17.7 us for 8 rows.
SMALL_ELEMENTS_OF_ALL = 1 << 20
LARGE_TILE = 8192  # numbers of a program's step that sends tiles
PROGRAMS_PER_SM = 2
DEPTH = 2  # tiles that a program sends before it takes one in
RING = 2 * DEPTH


class InboxLayout(NamedTuple):
    """Where things lie in the memory that peers write to, in bytes from its start.

    Attributes:
        num_gpus: N.
        small_elements: Most numbers of an array that is sent in packets.
        large_elements: Most numbers of any array; 0 without the second kind.
        num_programs: Programs of a large sum, and rings of a call.
    """

    num_gpus: int
    small_elements: int
    large_elements: int
    num_programs: int

    @property
    def packet_bytes(self) -> int:
        """Packets of one sender in one call."""
        return _cdiv(self.small_elements, SMALL_TILE) * SMALL_TILE * 4

    @property
    def rings(self) -> int:
        """Start of the rings."""
        return PARITIES * self.num_gpus * self.packet_bytes

    @property
    def ring_bytes(self) -> int:
        """Rings of one call."""
        return self.num_programs * RING * LARGE_TILE * 2

    @property
    def flags(self) -> int:
        """Start of the flags."""
        return self.rings + PARITIES * self.ring_bytes

    @property
    def flags_per_program(self) -> int:
        """Tiles that a program can have."""
        tiles = _cdiv(self.large_elements, LARGE_TILE)
        return _cdiv(tiles, self.num_programs) if tiles else 0

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return self.flags + PARITIES * self.num_programs * self.flags_per_program * 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peers:
    """How the GPUs of a mesh axis reach each other, and the number of the next sum.

    Sums in a row have numbers in a row, on all GPUs the same: ``origin[1] + calls_before``. Each
    has to depend on the one before, as those of a model's layers do: XLA may run independent
    kernels in any order, or at once, and then a GPU waits for packets that were overwritten.

    Attributes:
        calls_before: A constant, mostly, which costs no kernel of its own.
        layout: Static. Of the inboxes.
    """

    addresses: Int[Array, "N 2"]  # of the inboxes: the lower and the upper 32 bits
    origin: Int[Array, " 2"]  # which of the GPUs this is, and the number of the step's first sum
    calls_before: Int[Array, ""] | np.int32
    layout: InboxLayout = dataclasses.field(metadata={"static": True})

    def after(self, num_calls: int) -> "Peers":
        """Return the peers as they are for the sum after so many others."""
        return dataclasses.replace(self, calls_before=self.calls_before + np.int32(num_calls))


def inbox_layout(num_gpus: int, max_elements: int, target: Target) -> InboxLayout:
    """Return what inboxes are needed for sums of arrays of up to ``max_elements`` numbers."""
    has_large = num_gpus == 2
    return InboxLayout(
        num_gpus=num_gpus,
        small_elements=min(SMALL_ELEMENTS_OF_ALL // num_gpus, max_elements),
        large_elements=max_elements if has_large else 0,
        num_programs=PROGRAMS_PER_SM * target.num_sms if has_large else 0,
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
