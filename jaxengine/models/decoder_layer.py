"""A decoder layer: attention and feed-forward layer, wired to the residual stream in three ways.

A product's sum, over its splits and over the shards, is left to the norm that follows it
(``join``). For the last product of a layer that norm is the next layer's: a layer takes the norms
of the stream that it reads, and returns the stream and what is due to it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxengine.batch import InputBatch
from jaxengine.convert.model_spec import AttentionSpec, ExpertsSpec, LayerSpec, NormSpec
from jaxengine.layers.attention import Attention, CosSin, KVPair
from jaxengine.layers.experts import Experts
from jaxengine.layers.mlp import FeedForward
from jaxengine.layers.norm import Norm, join
from jaxengine.models.options import ModelOptions
from jaxengine.pallas_kernels.operands import Addends
from jaxengine.pallas_kernels.peers import Peers

Rows = Float[Array, "rows D"]


class LayerOutput(NamedTuple):
    """What a layer hands on.

    Attributes:
        residual: The stream, of each token, or with ``batch.last_tokens_only`` of each row.
        due: What is yet to be added to it; None for nothing.
        caches: The layer's keys and values; None if it has no attention.
    """

    residual: Rows
    due: Addends | None
    caches: KVPair | None


class DecoderLayer(nnx.Module):
    """A layer of a spec. See ``convert/model_spec.py`` for the equations of its wiring."""

    def __init__(
        self, hidden_size: int, spec: LayerSpec, options: ModelOptions, *, dtype: Any
    ) -> None:
        self.spec, self.target = spec, options.target

        def norm(own: NormSpec | None) -> Norm | None:
            return None if own is None else Norm((hidden_size,), own, dtype=dtype)

        self.input_norm = norm(spec.attention_norm)
        self.post_attention_norm = norm(spec.feed_forward_norm)
        self.attention_out_norm = norm(spec.attention_out_norm)
        self.mlp_out_norm = norm(spec.feed_forward_out_norm)
        shared: dict[str, Any] = {
            "dtype": dtype,
            "target": options.target,
            "input_major": options.input_major,
        }
        assert spec.attention is None or isinstance(spec.attention, AttentionSpec), (
            "no family asks for latent attention"
        )
        self.attention = (
            None
            if spec.attention is None
            else Attention(
                hidden_size,
                spec.attention,
                num_shards=options.num_shards,
                implementation=options.attention_backend,
                **shared,
            )
        )
        self.mlp = self._new_feed_forward(hidden_size, options.num_shards, shared)

    def _new_feed_forward(
        self, hidden_size: int, num_shards: int, shared: dict[str, Any]
    ) -> FeedForward | Experts | None:
        if (own := self.spec.feed_forward) is None:
            return None
        if isinstance(own, ExpertsSpec):
            return Experts(hidden_size, own, num_shards=num_shards, **shared)
        return FeedForward(hidden_size, own, **shared)

    @property
    def num_sums(self) -> int:
        """Sums over the shards that the layer makes or leaves due."""
        parts = [part.num_sums for part in (self.attention, self.mlp) if part is not None]
        return min(1, sum(parts)) if self.spec.wiring == "parallel" else sum(parts)

    @property
    def num_inner_sums(self) -> int:
        """Those that it makes itself: all but the one that is left due."""
        return max(0, self.num_sums - 1)

    @property
    def read_norms(self) -> tuple[Norm, ...]:
        """Norms of the stream that the layer wants to be called with; () reads it as it is."""
        if self.spec.wiring == "post":
            return ()
        if self.spec.wiring == "parallel":
            norms = [self.input_norm, self.post_attention_norm]
        else:
            norms = [self.input_norm if self.attention is not None else self.post_attention_norm]
        return tuple(norm for norm in norms if norm is not None)

    def __call__(
        self,
        x: Rows,
        normed: tuple[Rows, ...],
        batch: InputBatch,
        cos_sin: CosSin | None,
        caches: KVPair | None,
    ) -> LayerOutput:
        """Run the layer.

        Args:
            x: The residual stream.
            normed: Its ``read_norms``.
            batch: The step, with the number of the layer's first sum.
            cos_sin: Of the tokens' angles; None without rotation.
            caches: The layer's keys and values; None if it has no attention.
        """
        first = normed[0] if normed else x
        if self.attention is None or caches is None:
            if batch.last_tokens_only:
                x, first = x[batch.logits_indices], first[batch.logits_indices]
            return LayerOutput(x, self.fed_forward(first, batch), None)
        attended, caches = self.attention(first, batch, cos_sin, caches)
        second = normed[-1] if normed else x
        if batch.last_tokens_only:
            x, second = x[batch.logits_indices], second[batch.logits_indices]
        if self.spec.wiring == "parallel":
            due = self.fed_forward(second, batch)
            return LayerOutput(x, attended if due is None else attended + due, caches)
        if self.mlp is None:
            return LayerOutput(x, attended, caches)
        if self.spec.wiring == "post":
            x = self._normalised(attended, x, self.input_norm, batch.peers)
            return LayerOutput(x, self.fed_forward(x, batch), caches)
        norms = () if self.post_attention_norm is None else (self.post_attention_norm,)
        x, read = join(
            attended,
            x,
            norms,
            inner=self.attention_out_norm,
            scale=self.spec.residual_scale,
            peers=batch.peers,
            target=self.target,
        )
        return LayerOutput(x, self.fed_forward(read[0] if read else x, batch), caches)

    def join_due(
        self, output: LayerOutput, norms: tuple[Norm, ...], peers: Peers | None
    ) -> tuple[Rows, tuple[Rows, ...]]:
        """Add what the layer has left due; return the stream and its norms for the next reader."""
        if self.spec.wiring == "post":
            x = output.residual
            if output.due is not None:
                norm = self.post_attention_norm if self.mlp is not None else self.input_norm
                x = self._normalised(output.due, x, norm, peers)
            return x, tuple(norm(x) for norm in norms)
        inner = self.mlp_out_norm if self.mlp is not None else self.attention_out_norm
        return join(
            output.due,
            output.residual,
            norms,
            inner=inner,
            scale=self.spec.residual_scale,
            peers=peers,
            target=self.target,
        )

    def _normalised(
        self, addends: Addends, x: Rows, norm: Norm | None, peers: Peers | None
    ) -> Rows:
        """The stream of a layer that normalises behind its sums."""
        assert norm is not None, "a post-norm layer has norms"
        _, (normed,) = join(addends, x, (norm,), peers=peers, target=self.target)
        return jnp.asarray(normed)

    def fed_forward(self, x: Rows, batch: InputBatch) -> Addends | None:
        """Serve some rows; return what is yet to be added up, None without a part for it."""
        if self.mlp is None:
            return None
        if isinstance(self.mlp, Experts):
            is_real = batch.is_real_row if batch.last_tokens_only else batch.is_real_token
            return self.mlp.addends(x, is_real=is_real)
        # A faster kernel would spare the one layer of its kind nothing, and the start would have to
        # trace and compile it for every size.
        implementation = "reference" if batch.last_tokens_only else None
        return self.mlp.addends(x, implementation=implementation)
