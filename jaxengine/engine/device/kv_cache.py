"""The paged KV cache on the device: bytes, how many blocks fit, allocation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxengine.models.decoder import LayerCaches
from jaxengine.sharding import TENSOR_AXIS

CACHE_SPEC = P(None, TENSOR_AXIS, None, None)  # [num_blocks, K, block_size, H], heads are cut


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """Shape of the cache of one pipeline stage.

    Attributes:
        num_kv_heads: K over all shards.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values, all layers, all shards."""
        itemsize = jnp.dtype(self.dtype).itemsize
        values = self.num_layers * self.num_kv_heads * self.block_size * self.head_dim
        return 2 * values * itemsize

    def shape(self, num_blocks: int) -> tuple[int, int, int, int]:
        """Shape of one layer's keys (or values)."""
        return (num_blocks, self.num_kv_heads, self.block_size, self.head_dim)

    def abstract(
        self, num_blocks: int, mesh: Mesh
    ) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """The cache as shapes, to compile with before it exists."""
        sharding = NamedSharding(mesh, CACHE_SPEC)
        one = jax.ShapeDtypeStruct(self.shape(num_blocks), jnp.dtype(self.dtype), sharding=sharding)
        return [(one, one) for _ in range(self.num_layers)]

    def allocate(self, num_blocks: int, mesh: Mesh) -> LayerCaches:
        """Make the cache, all zeros: attention multiplies unused slots by 0, so never by NaN."""
        zeros = jax.jit(
            functools.partial(jnp.zeros, self.shape(num_blocks), jnp.dtype(self.dtype)),
            out_shardings=NamedSharding(mesh, CACHE_SPEC),
        )
        return [(zeros(), zeros()) for _ in range(self.num_layers)]
