"""The decoder: any model that a ``ModelSpec`` describes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxengine.batch import CachePlace, InputBatch
from jaxengine.convert.model_spec import NormSpec, RopeSpec
from jaxengine.layers.attention import CosSin, KVPair
from jaxengine.layers.embedding import PositionEmbedding, VocabBias, VocabEmbedding, embed
from jaxengine.layers.linear import Linear
from jaxengine.layers.norm import Norm
from jaxengine.layers.rope import rope_cos_sin, rope_frequencies
from jaxengine.model_config import ModelConfig
from jaxengine.models.decoder_layer import DecoderLayer, LayerOutput
from jaxengine.models.options import ModelOptions
from jaxengine.models.tapped_layer import run_tapped_layer
from jaxengine.taps import Taps, tap

LayerCaches = list[KVPair]  # a (k_cache, v_cache) pair for each cache array of the stage


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, state: Any, *inputs: Any) -> LayerOutput:
    """Call a layer; being jitted, all layers of a kind are traced and lowered once."""
    return nnx.merge(graphdef, state)(*inputs)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and output projection; a stage holds some of the layers.

    Args:
        config: The model.
        options: What the engine decides.
    """

    def __init__(self, config: ModelConfig, options: ModelOptions) -> None:
        spec, dtype = config.spec, jnp.dtype(config.dtype)
        layers = range(spec.num_layers) if options.layers is None else options.layers
        self.spec, self.dtype = spec, config.dtype
        self.layer_numbers = layers
        self.max_model_len = options.max_model_len
        self.cache_places = options.cache_places or own_places(config, layers)
        new_embedding = functools.partial(
            VocabEmbedding,
            spec.vocab_size,
            spec.embedding.size or spec.hidden_size,
            dtype=dtype,
            input_major=options.input_major,
        )

        def norm(own: NormSpec | None) -> Norm | None:
            return None if own is None else Norm((spec.hidden_size,), own, dtype=dtype)

        is_first, is_last = layers.start == 0, layers.stop == spec.num_layers
        has_embedding = is_first or (is_last and spec.head.is_tied)
        self.embed_tokens = new_embedding() if has_embedding else None
        self.embed_norm = norm(spec.embedding.norm) if is_first else None
        size, D = spec.embedding.size, spec.hidden_size
        projection = functools.partial(
            Linear,
            spec=P(None, None),
            dtype=dtype,
            target=options.target,
            input_major=options.input_major,
        )
        self.project_in = projection((D,), (size,)) if size is not None and is_first else None
        self.project_out = projection((size,), (D,)) if size is not None and is_last else None
        has_positions = is_first and spec.embedding.num_positions > 0
        self.embed_positions = (
            PositionEmbedding(spec.embedding, spec.hidden_size, dtype=dtype)
            if has_positions
            else None
        )
        # A dict by the layer's own number, so that a stage's parameters keep the model's names.
        self.layers = nnx.Dict(
            {
                str(layer): DecoderLayer(spec.hidden_size, spec.layers[layer], options, dtype=dtype)
                for layer in layers
            }
        )
        self.norm = norm(spec.final_norm) if is_last else None
        self.lm_head = new_embedding() if is_last and not spec.head.is_tied else None
        has_bias = is_last and spec.head.has_bias
        self.lm_head_bias = VocabBias(spec.vocab_size, dtype=dtype) if has_bias else None

    @property
    def num_sums(self) -> int:
        """Sums over the shards that a call makes, all of them with the numbers of ``batch``."""
        layers = sum(self.layers[str(number)].num_sums for number in self.layer_numbers)
        return layers + (VocabEmbedding.num_sums if self.layer_numbers.start == 0 else 0)

    def __call__(
        self,
        batch: InputBatch,
        caches: LayerCaches,
        hidden: Float[Array, "T D"] | None = None,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "outputs D"], LayerCaches]:
        """Run the stage's layers over the step's tokens.

        With ``batch.last_tokens_only`` the last layer does little more than write its cache for
        tokens whose output nobody reads, and the output is [B, D]: in a long prefill one layer's
        work less.

        Args:
            batch: The step.
            caches: The stage's caches; donate them, the new ones are returned.
            hidden: The previous stage's output; None for the first stage.
            taps: Where somebody looks in; the step then has no peers, and every token's output is
                returned.
        """
        x = hidden
        if x is None:
            x = tap(taps, "embedding", self._embedded(batch))
            batch = batch.after_sums(VocabEmbedding.num_sums)
        cos_sin = self._cos_sin(batch.positions)
        all_tokens = dataclasses.replace(batch, last_tokens_only=False)
        # The dict's own order is alphabetic: 0, 1, 10, 2.
        layers = [self.layers[str(number)] for number in self.layer_numbers]
        if taps is not None:
            return self._run_tapped(layers, x, batch, cos_sin, list(caches), taps)
        normed = tuple(norm(x) for norm in layers[0].read_norms)
        caches, num_sums = list(caches), 0
        for index, (layer, place) in enumerate(zip(layers, self.cache_places, strict=True)):
            is_models_last = self.layer_numbers[index] == self.spec.num_layers - 1
            wanted = (batch if is_models_last else all_tokens).after_sums(num_sums)
            output = _run_layer(
                *nnx.split(layer),
                x,
                normed,
                wanted if place is None else wanted.of_group(place.group),
                cos_sin.get(_rope_of(layer)),
                None if place is None else caches[place.array],
            )
            if place is not None:
                assert output.caches is not None
                caches[place.array] = output.caches
            due = batch.after_sums(num_sums + layer.num_inner_sums).peers
            readers = layers[index + 1].read_norms if index + 1 < len(layers) else ()
            x, normed = layer.join_due(output, readers, due)
            num_sums += layer.num_sums
        return x, caches

    def _run_tapped(
        self,
        layers: list[DecoderLayer],
        x: Float[Array, "T D"],
        batch: InputBatch,
        cos_sin: dict[RopeSpec | None, CosSin],
        caches: LayerCaches,
        taps: Taps,
    ) -> tuple[Float[Array, "T D"], LayerCaches]:
        numbered = zip(self.layer_numbers, layers, self.cache_places, strict=True)
        for number, layer, place in numbered:
            x, new = run_tapped_layer(
                layer,
                x,
                batch if place is None else batch.of_group(place.group),
                cos_sin.get(_rope_of(layer)),
                None if place is None else caches[place.array],
                taps.within(f"layers.{number}"),
            )
            if place is not None:
                assert new is not None
                caches[place.array] = new
        return x, caches

    def _embedded(self, batch: InputBatch) -> Float[Array, "T D"]:
        assert self.embed_tokens is not None, "only the first stage starts from tokens"
        return embed(
            batch.token_ids,
            batch.positions,
            batch.peers,
            scale=self.spec.embedding.scale,
            tokens=self.embed_tokens,
            projection=self.project_in,
            learned_positions=self.embed_positions,
            norm=self.embed_norm,
        )

    def _cos_sin(self, positions: Int[Array, " T"]) -> dict[RopeSpec | None, CosSin]:
        """Cosines and sines of the tokens' angles, for each rotary embedding of the stage."""
        ropes = {_rope_of(self.layers[str(number)]) for number in self.layer_numbers}
        return {
            rope: rope_cos_sin(positions, *rope_frequencies(rope, self.max_model_len))
            for rope in sorted((r for r in ropes if r is not None), key=repr)
        }

    def compute_logits(
        self, hidden: Float[Array, "B D"], taps: Taps | None = None
    ) -> Float[Array, "B local_V"]:
        """Scores of the next token for some rows of the last stage's output.

        They are those of this shard's part of the vocabulary.

        Args:
            hidden: The rows.
            taps: Where somebody looks in.
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None, "only the last stage has logits"
        x = tap(taps, "final", hidden if self.norm is None else self.norm(hidden))
        if self.project_out is not None:
            x = self.project_out(x)
        logits = head.logits(x)
        if self.lm_head_bias is not None:
            logits = logits + self.lm_head_bias.bias[...]
        if self.spec.head.scale != 1:
            logits = logits * jnp.asarray(self.spec.head.scale, logits.dtype)
        if (cap := self.spec.head.soft_cap) is not None:
            logits = (cap * jnp.tanh(logits.astype(jnp.float32) / cap)).astype(logits.dtype)
        return tap(taps, "logits", logits)


def _rope_of(layer: DecoderLayer) -> RopeSpec | None:
    return None if layer.spec.attention is None else layer.spec.attention.rope


def own_places(config: ModelConfig, layers: range) -> tuple[CachePlace | None, ...]:
    """A cache of its own for each layer that has attention, all with the same block table."""
    places: list[CachePlace | None] = []
    for layer in layers:
        has_attention = config.spec.layers[layer].attention is not None
        count = sum(place is not None for place in places)
        places.append(CachePlace(group=0, array=count) if has_attention else None)
    return tuple(places)
