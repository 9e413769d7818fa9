"""The pre-norm decoder that Llama and its relatives share; families differ by a DecoderSpec."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxengine.batch import InputBatch
from jaxengine.config import ModelConfig
from jaxengine.layers.attention import Attention, AttentionSpec
from jaxengine.layers.linear import Embedding, add_parts
from jaxengine.layers.mlp import GatedMLP
from jaxengine.layers.norm import RMSNorm
from jaxengine.layers.rope import rope_cos_sin, rope_frequencies

SUMS_OF_LAYER = 2  # over the shards: behind attention and behind the feed-forward layer
LayerCaches = list[tuple[Array, Array]]  # a (k_cache, v_cache) pair for each layer of the stage


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Where a family departs from Llama."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    has_qk_norm: bool = False


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What the engine decides about a model, rather than its checkpoint.

    Attributes:
        layers: The layers this pipeline stage holds; None for all of them.
        num_kv_heads: KV heads in the weights and the cache: the model's, or the tensor-parallel
            size where that is larger (heads are then repeated).
        max_model_len: Longest sequence, in tokens; some rope types depend on it.
        attention_backend: Kernel to use; None for the best one.
        input_major: How the weights of matrix products lie in memory, see ``Linear``.
    """

    num_kv_heads: int
    max_model_len: int
    layers: range | None = None
    attention_backend: str | None = None
    input_major: bool = False


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    A product's sum, over its splits and over the shards, is left to the norm that follows
    (``residual_norm``). For the feed-forward layer's that is the next layer's, so that whoever
    calls the layers applies their input norms.

    It returns an output for each token, or with ``batch.last_tokens_only`` for each row [B, D].
    """

    def __init__(
        self, config: ModelConfig, spec: DecoderSpec, options: ModelOptions, layer: int
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        eps = config.rms_norm_eps
        attention = AttentionSpec(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=options.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=spec.qkv_bias,
            out_bias=spec.out_bias,
            qk_norm_eps=eps if spec.has_qk_norm else None,
            sliding_window=config.sliding_windows[layer],
            implementation=options.attention_backend,
            input_major=options.input_major,
        )
        self.input_norm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.attention = Attention(attention, dtype=dtype)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            hidden_act=config.hidden_act,
            use_bias=spec.mlp_bias,
            dtype=dtype,
            input_major=options.input_major,
        )

    def __call__(
        self,
        x: Float[Array, "T D"],
        normed: Float[Array, "T D"],
        batch: InputBatch,
        cos_sin: Any,
        caches: tuple[Array, Array],
    ) -> tuple[Float[Array, "outputs D"], Float[Array, "S outputs D"], tuple[Array, Array]]:
        """Run the layer.

        Args:
            x: The residual stream.
            normed: Its input norm.
            batch: The step, with the number of the layer's first sum.
            cos_sin: Of the tokens' angles.
            caches: The layer's keys and values.

        Returns:
            The residual stream, parts of a product that are yet to be added to it, and the caches.
        """
        attended, *new_caches = self.attention(normed, batch, cos_sin, *caches)
        if batch.last_tokens_only:
            x = x[batch.logits_indices]
        x, normed = self.post_attention_norm.after_sum(attended, x, batch.peers)
        # A faster kernel would spare the one layer of its kind nothing, and the start would have to
        # trace and compile it for every size.
        implementation = "reference" if batch.last_tokens_only else None
        parts = self.mlp.parts(normed, implementation=implementation)
        return x, parts, (new_caches[0], new_caches[1])


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, state: Any, *inputs: Any) -> tuple:
    """Call a layer; being jitted, all layers of a kind are traced and lowered once."""
    return nnx.merge(graphdef, state)(*inputs)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and output projection; a stage holds some of the layers.

    Args:
        config: The model's shape.
        options: What the engine decides.
        spec: What the family is.
    """

    def __init__(self, config: ModelConfig, options: ModelOptions, spec: DecoderSpec) -> None:
        layers = range(config.num_layers) if options.layers is None else options.layers
        dtype = jnp.dtype(config.dtype)
        new_embedding = functools.partial(
            Embedding,
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            input_major=options.input_major,
        )
        is_first, is_last = layers.start == 0, layers.stop == config.num_layers
        self.layer_numbers = layers
        self.config, self.max_model_len = config, options.max_model_len
        tied = config.tie_word_embeddings
        has_embedding = is_first or (is_last and tied)
        self.embed_tokens = new_embedding() if has_embedding else None
        # A dict by the layer's own number, so that a stage's parameters keep the model's names.
        self.layers = nnx.Dict(
            {str(layer): DecoderLayer(config, spec, options, layer) for layer in layers}
        )
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype) if is_last else None
        )
        self.lm_head = new_embedding() if is_last and not tied else None

    @property
    def num_sums(self) -> int:
        """Sums over the shards that a call makes, all of them with the numbers of ``batch``."""
        return (self.layer_numbers.start == 0) + SUMS_OF_LAYER * len(self.layer_numbers)

    def __call__(
        self, batch: InputBatch, caches: LayerCaches, hidden: Float[Array, "T D"] | None = None
    ) -> tuple[Float[Array, "outputs D"], LayerCaches]:
        """Run the stage's layers over the step's tokens.

        With ``batch.last_tokens_only`` the last layer does little more than write its cache for
        tokens whose output nobody reads, and the output is [B, D]: in a long prefill one layer's
        work less.

        Args:
            batch: The step.
            caches: KV caches of the stage's layers; donate them, the new ones are returned.
            hidden: The previous stage's output; None for the first stage.
        """
        x = hidden
        if x is None:
            assert self.embed_tokens is not None, "only the first stage starts from tokens"
            x = self.embed_tokens(batch.token_ids, batch.peers)
        if self.layer_numbers.start == 0:
            batch = batch.after_sums(1)  # the embedding's, also where a subclass has looked it up
        config = self.config
        frequencies, factor = rope_frequencies(
            config.rope, config.head_dim, config.max_position_embeddings, self.max_model_len
        )
        cos_sin = rope_cos_sin(batch.positions, frequencies, factor)
        all_tokens = dataclasses.replace(batch, last_tokens_only=False)
        # The dict's own order is alphabetic: 0, 1, 10, 2.
        layers = [self.layers[str(number)] for number in self.layer_numbers]
        normed = layers[0].input_norm(x)
        new_caches: LayerCaches = []
        for index, (number, cache) in enumerate(zip(self.layer_numbers, caches, strict=True)):
            wanted = batch if number == config.num_layers - 1 else all_tokens
            wanted = wanted.after_sums(SUMS_OF_LAYER * index)
            x, parts, cache = _run_layer(
                *nnx.split(layers[index]), x, normed, wanted, cos_sin, cache
            )
            new_caches.append(cache)
            peers = batch.after_sums(SUMS_OF_LAYER * index + 1).peers  # attention's was the first
            if index + 1 < len(layers):
                x, normed = layers[index + 1].input_norm.after_sum(parts, x, peers)
            else:
                x = add_parts(x, parts, peers)
        return x, new_caches

    def compute_logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B local_V"]:
        """Scores of the next token for some rows of the last stage's output.

        They are those of this shard's part of the vocabulary.
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None, "only the last stage has logits"
        assert self.norm is not None, "only the last stage has logits"
        return head.logits(self.norm(hidden))
