"""The encoder: any model of a ``ModelSpec`` with ``is_encoder``. One device, no cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.convert.model_spec import (
    AttentionSpec,
    FeedForwardSpec,
    LabelsSpec,
    LayerSpec,
    NormSpec,
)
from jaxengine.layers.embedding import PositionEmbedding, VocabEmbedding
from jaxengine.layers.linear import Linear
from jaxengine.layers.mlp import FeedForward
from jaxengine.layers.norm import Norm, join
from jaxengine.layers.packed_attention import PackedAttention
from jaxengine.layers.parameter import parameter
from jaxengine.model_config import ModelConfig
from jaxengine.models.options import ModelOptions
from jaxengine.pallas_kernels.operands import Addends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Sequences one behind the other.

    Attributes:
        token_ids: Of all sequences, then padding.
        positions: Each token's in its own sequence.
        token_types: Which part of a pair it belongs to.
        query_start_loc: First token of each sequence, and the end of the last, repeated for rows
            that are padding.
    """

    token_ids: Int[Array, " T"]
    positions: Int[Array, " T"]
    token_types: Int[Array, " T"]
    query_start_loc: Int[Array, " B_plus_1"]


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, state: Any, *inputs: Any) -> Array:
    """Call a layer; being jitted, all layers of a kind are traced and lowered once."""
    return nnx.merge(graphdef, state)(*inputs)


class TokenTypeEmbedding(nnx.Module):
    """A learned row for each part of a pair."""

    def __init__(self, num_types: int, hidden_size: int, *, dtype: Any) -> None:
        self.weight = parameter((num_types, hidden_size), dtype, P(None, None))

    def __call__(self, token_types: Int[Array, " T"]) -> Float[Array, "T D"]:
        return jnp.take(self.weight[...], token_types, axis=0, mode="clip")


class EncoderLayer(nnx.Module):
    """A layer whose norms stand behind its sums ("post", see ``convert/model_spec.py``)."""

    def __init__(
        self, hidden_size: int, spec: LayerSpec, options: ModelOptions, *, dtype: Any
    ) -> None:
        assert isinstance(spec.attention, AttentionSpec), "an encoder's layers have attention"
        assert isinstance(spec.feed_forward, FeedForwardSpec), "no encoder has experts"
        assert spec.wiring == "post", "no family of encoders is wired otherwise"
        assert spec.attention_norm is not None, "a post-norm layer has norms"
        assert spec.feed_forward_norm is not None, "a post-norm layer has norms"
        self.target = options.target
        shared: dict[str, Any] = {
            "dtype": dtype,
            "target": options.target,
            "input_major": options.input_major,
        }
        self.attention = PackedAttention(
            hidden_size, spec.attention, implementation=options.attention_backend, **shared
        )
        self.input_norm = Norm((hidden_size,), spec.attention_norm, dtype=dtype)
        self.mlp = FeedForward(hidden_size, spec.feed_forward, **shared)
        self.post_attention_norm = Norm((hidden_size,), spec.feed_forward_norm, dtype=dtype)

    def __call__(
        self, x: Float[Array, "T D"], query_start_loc: Int[Array, " B_plus_1"]
    ) -> Float[Array, "T D"]:
        x = self._joined(self.attention(x, query_start_loc), x, self.input_norm)
        return self._joined(self.mlp.addends(x), x, self.post_attention_norm)

    def _joined(self, due: Addends, x: Float[Array, "T D"], norm: Norm) -> Float[Array, "T D"]:
        _, (normed,) = join(due, x, (norm,), target=self.target)
        return jnp.asarray(normed)


class Labels(nnx.Module):
    """Scores of sequences, from their first tokens."""

    def __init__(
        self, hidden_size: int, spec: LabelsSpec, options: ModelOptions, *, dtype: Any
    ) -> None:
        self.activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[spec.activation]
        linear = functools.partial(
            Linear,
            in_shape=(hidden_size,),
            spec=P(None, None),
            dtype=dtype,
            target=options.target,
            use_bias=True,
            input_major=options.input_major,
        )
        self.dense = linear((hidden_size,))
        self.out = linear((spec.num_labels,))

    def __call__(self, first: Float[Array, "B D"]) -> Float[Array, "B labels"]:
        return self.out(self.activation(self.dense(first)))


class Encoder(nnx.Module):
    """Embedding, layers, and what scores sequences.

    Args:
        config: The model.
        options: What the engine decides; one shard, all layers.
    """

    def __init__(self, config: ModelConfig, options: ModelOptions) -> None:
        spec, dtype = config.spec, jnp.dtype(config.dtype)
        D, embedding = spec.hidden_size, spec.embedding
        self.embed_tokens = VocabEmbedding(spec.vocab_size, D, dtype=dtype)
        self.embed_positions = PositionEmbedding(embedding, D, dtype=dtype)
        num_types = embedding.num_token_types
        self.embed_token_types = (
            TokenTypeEmbedding(num_types, D, dtype=dtype) if num_types else None
        )
        self.embed_norm = _norm(D, embedding.norm, dtype)
        self.num_layers = spec.num_layers
        self.layers = nnx.Dict(
            {
                str(number): EncoderLayer(D, layer, options, dtype=dtype)
                for number, layer in enumerate(spec.layers)
            }
        )
        self.labels = None if spec.labels is None else Labels(D, spec.labels, options, dtype=dtype)

    def __call__(self, batch: PackedBatch) -> Float[Array, "T D"]:
        """Return the last layer's output; rows of padding are not to be read."""
        x = self.embed_tokens(batch.token_ids) + self.embed_positions(batch.positions)
        if self.embed_token_types is not None:
            x = x + self.embed_token_types(batch.token_types)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        for number in range(self.num_layers):
            layer = self.layers[str(number)]
            x = _run_layer(*nnx.split(layer), x, batch.query_start_loc)
        return x


def _norm(hidden_size: int, spec: NormSpec | None, dtype: Any) -> Norm | None:
    return None if spec is None else Norm((hidden_size,), spec, dtype=dtype)
