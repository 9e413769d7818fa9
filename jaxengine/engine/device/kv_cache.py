"""The paged KV cache on the device: bytes, how many blocks fit, allocation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxengine.model_config import ModelConfig
from jaxengine.models.decoder import LayerCaches
from jaxengine.sharding import TENSOR_AXIS, held_kv_heads

Shape = tuple[int, int, int, int]

CACHE_SPEC = P(None, TENSOR_AXIS, None, None)  # [num_blocks, K, block_size, H], heads are cut


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """Shape of the cache of one pipeline stage.

    Attributes:
        heads: KV heads over all shards and the lengths of their keys and values, of each layer that
            has attention: a block takes of each just what it needs. A latent cache has keys alone.
    """

    heads: tuple[tuple[int, int, int], ...]
    block_size: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values, all layers, all shards."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return (
            self.block_size * itemsize * sum(K * (keys + values) for K, keys, values in self.heads)
        )

    def shapes(self, num_blocks: int) -> list[tuple[Shape, Shape]]:
        """Shapes of each layer's keys and values."""
        return [
            ((num_blocks, K, self.block_size, keys), (num_blocks, K, self.block_size, values))
            for K, keys, values in self.heads
        ]

    def abstract(
        self, num_blocks: int, mesh: Mesh
    ) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """The cache as shapes, to compile with before it exists."""
        sharding = NamedSharding(mesh, CACHE_SPEC)
        like = functools.partial(
            jax.ShapeDtypeStruct, dtype=jnp.dtype(self.dtype), sharding=sharding
        )
        return [(like(keys), like(values)) for keys, values in self.shapes(num_blocks)]

    def allocate(self, num_blocks: int, mesh: Mesh) -> LayerCaches:
        """Make the cache, all zeros: attention multiplies unused slots by 0, so never by NaN."""
        zeros = jax.jit(  # a program a shape
            jnp.zeros, static_argnums=(0, 1), out_shardings=NamedSharding(mesh, CACHE_SPEC)
        )
        dtype = jnp.dtype(self.dtype)
        shapes = self.shapes(num_blocks)
        return [(zeros(keys, dtype), zeros(values, dtype)) for keys, values in shapes]


def kv_heads(
    model: ModelConfig, layers: range, num_shards: int
) -> tuple[tuple[int, int, int], ...]:
    """KV heads and the lengths of keys and values, of a stage's layers that have attention.

    Args:
        model: Whose layers they are.
        layers: Those of the stage.
        num_shards: Devices that share the heads.
    """
    attentions = (model.spec.layers[layer].attention for layer in layers)
    return tuple(
        (held_kv_heads(attention.num_kv_heads, num_shards), *attention.cached_dims)
        for attention in attentions
        if attention is not None
    )
