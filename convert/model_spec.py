"""What a model is: a ModelSpec, made from a checkpoint's config by its family.

Every fact of a family is here, once: the table that finds the weights and the decoder that uses
them read the same spec. Nothing behind it knows Hugging Face's names. Frozen and hashable, so that
equal layers share what is traced for one of them. Standard library only.

A layer adds up to two functions to the residual stream x [T, D]::

    sequential   x = x + s * out_a(attention(norm_a(x)))
                 x = x + s * out_f(feed_forward(norm_f(x)))
    parallel     x = x + s * (attention(norm_a(x)) + feed_forward(norm_f(x)))
    post         x = norm_a(x + attention(x))
                 x = norm_f(x + feed_forward(x))

where s is ``residual_scale``. A sequential layer with out norms is the sandwich of Gemma 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class NormSpec:
    """A normalisation over the last axis.

    Attributes:
        kind: "rms" (arXiv:1910.07467) or "layer" (arXiv:1607.06450).
        eps: Added to the mean square or the variance.
        has_weight: Whether it multiplies by a learned weight.
        has_bias: Whether it adds a learned bias.
        offset: Added to the weight: 1 in Gemma, whose checkpoints hold ``weight - 1``. Where it
            is not 0 the product with the weight is taken in float32.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    has_weight: bool = True
    has_bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class RopeSpec:
    """A rotary position embedding (arXiv:2104.09864).

    Halves are paired as in Llama: dimension j with j + rotary_dim / 2. Checkpoints that pair
    neighbours have their rows reordered by the table.

    Attributes:
        rotary_dim: Leading dimensions of a head that are rotated.
        theta: Base of the frequencies.
        rope_type: default, linear, dynamic, llama3, yarn or longrope.
        original_length: Sequence length before scaling, in tokens; 0 where no type needs it.
        parameters: The remaining numbers of that type (``factor``, ...), as pairs.
    """

    rotary_dim: int
    theta: float = 10000.0
    rope_type: str = "default"
    original_length: int = 0
    parameters: tuple[tuple[str, Any], ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """A number of the type; ``default`` where the config has none or null."""
        value = dict(self.parameters).get(name)
        return default if value is None else value


@dataclass(frozen=True)
class HeadNormSpec:
    """Normalisation of queries and keys, before the rotation unless said.

    Attributes:
        norm: Its kind.
        scope: "head": one weight [H] for all heads; "heads": a weight [H] a head; "all": one norm
            over all heads of a token together (OLMo 2).
        follows_rope: Whether heads are rotated first (HunYuan); only with scope "head".
    """

    norm: NormSpec
    scope: Literal["head", "heads", "all"] = "head"
    follows_rope: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer.

    Attributes:
        num_heads: N, query heads; head n uses KV head n // (N // K).
        num_kv_heads: K.
        head_dim: H.
        scale: Factor on q . k.
        sliding_window: Tokens a query sees, its own included; None for all.
        logits_soft_cap: Scores become cap * tanh(score / cap).
        rope: None for a model without rotation.
        alibi_slopes: slope * (key position - query position) is added to a head's scores
            (arXiv:2108.12409); None for none.
        has_sinks: Whether each head has one more column of the softmax, whose value is nothing.
        head_norm: Norms of queries and keys.
        qkv_clip: Queries, keys and values are cut to [-clip, clip].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    rope: RopeSpec | None = None
    alibi_slopes: tuple[float, ...] | None = None
    has_sinks: bool = False
    head_norm: HeadNormSpec | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qkv_clip: float | None = None


@dataclass(frozen=True)
class FeedForwardSpec:
    """A feed-forward layer: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` ungated."""

    intermediate_size: int
    activation: str
    is_gated: bool = True
    up_bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """A layer; None stands for a part that it lacks.

    Attributes:
        attention_norm: norm_a of the module's equations; None reads the stream as it is.
        feed_forward_norm: norm_f; in a parallel layer None shares ``attention_norm``'s output.
        attention_out_norm: out_a.
        feed_forward_out_norm: out_f.
        residual_scale: s, on what is added to the stream.
    """

    attention: AttentionSpec | None
    feed_forward: FeedForwardSpec | None
    attention_norm: NormSpec | None = NormSpec()
    feed_forward_norm: NormSpec | None = NormSpec()
    attention_out_norm: NormSpec | None = None
    feed_forward_out_norm: NormSpec | None = None
    wiring: Literal["sequential", "parallel", "post"] = "sequential"
    residual_scale: float = 1.0


@dataclass(frozen=True)
class EmbeddingSpec:
    """From token ids to the residual stream.

    Attributes:
        scale: Factor on a token's embedding, rounded to the model's dtype first.
        num_positions: Rows of a learned position embedding; 0 for none.
        position_offset: Position 0 is that row (2 in OPT).
        norm: Of the sum; None for none.
        size: Width of the token embeddings, and of what the head multiplies, where projections
            lie between them and the residual stream (OPT-350m); None for the hidden size.
    """

    scale: float = 1.0
    num_positions: int = 0
    position_offset: int = 0
    norm: NormSpec | None = None
    size: int | None = None


@dataclass(frozen=True)
class HeadSpec:
    """From the residual stream to scores over the vocabulary.

    Attributes:
        is_tied: Whether it is the token embedding.
        has_bias: Whether a bias is added.
        scale: Factor on the scores.
        soft_cap: Scores become cap * tanh(score / cap), after ``scale``.
        is_normalised: Whether each row of the weight is divided by its length (Baichuan 2).
    """

    is_tied: bool = False
    has_bias: bool = False
    is_normalised: bool = False
    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder, whole.

    Attributes:
        architecture: Hugging Face's name of it.
        max_position_embeddings: The longest sequence that it was made for, scaling included.
        final_norm: Behind the last layer; None where that layer has normalised.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    embedding: EmbeddingSpec = EmbeddingSpec()
    head: HeadSpec = HeadSpec()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)
