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
from typing import Any, ClassVar, Literal

Wiring = Literal["sequential", "parallel", "post"]


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
        qkv_clip: Queries, keys and values are cut to [-clip, clip], after a norm over all heads.
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

    @property
    def cached_dims(self) -> tuple[int, int]:
        """Lengths of what is cached of a token and KV head: its key and its value."""
        return self.head_dim, self.head_dim


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) of one layer.

    What is cached of a token is one vector for all heads: a normalised latent c, from which each
    head's key and value follow, and a key part that is rotated. Head n scores a token by
    ``scale * (q_nope . (U_n c) + q_rope . k_rope)`` and takes ``V_n c`` of it.

    Attributes:
        num_heads: N.
        latent_dim: Length of c.
        rope_dim: Length of the rotated part of a query or key.
        nope_dim: Length of the other part.
        value_dim: Length of a head's value.
        scale: Factor on the scores, with what yarn adds to it.
        rope: Of ``rope_dim`` dimensions.
        norm: Of the latents.
        query_rank: Length of a latent that queries are made of; None if there is none.
        has_bias: Whether the projections to the latents and the output have biases.
    """

    num_heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    scale: float
    rope: RopeSpec
    norm: NormSpec
    query_rank: int | None = None
    has_bias: bool = False

    num_kv_heads: ClassVar[int] = 1
    sliding_window: ClassVar[None] = None

    @property
    def head_dim(self) -> int:
        """H, of what is cached: the latent, then the rotated key."""
        return self.latent_dim + self.rope_dim

    @property
    def cached_dims(self) -> tuple[int, int]:
        """Lengths of what is cached of a token: all of it as a key, of which values are a part."""
        return self.head_dim, 0


@dataclass(frozen=True)
class FeedForwardSpec:
    """A feed-forward layer: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` ungated."""

    intermediate_size: int
    activation: str
    is_gated: bool = True
    up_bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True)
class RouterSpec:
    """Which experts a token goes to, and with which weights.

    From logits l [E], in float32: ::

        softmax         s = softmax(l); the largest s are chosen, and are the weights
        sigmoid         s = sigmoid(l), likewise
        softmax_chosen  the largest l are chosen, and their softmax are the weights
        sparsemixer     as SparseMixer-v2 does when it does not train (arXiv:2409.12136)

    Attributes:
        kind: Which of those.
        is_normalised: Whether the weights are divided by their sum.
        scale: Factor on the weights.
        has_bias: Whether a bias is added to l.
        has_correction: Whether a learned number an expert is added to s for the choice alone
            (arXiv:2408.15664).
        num_groups: Runs of experts, of which only the best are chosen from; 1 for no such limit.
        num_chosen_groups: How many.
        group_score: A group counts as its largest s, or as the sum of its two largest.
        tolerance: sparsemixer's: how far below the largest logit, as a share of it, others count.
        weighs_input: Whether the weight multiplies what an expert reads, not what it returns.
    """

    kind: Literal["softmax", "sigmoid", "softmax_chosen", "sparsemixer"] = "softmax"
    is_normalised: bool = False
    scale: float = 1.0
    has_bias: bool = False
    has_correction: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    tolerance: float = 0.0
    weighs_input: bool = False


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture: each token goes through few of many feed-forward layers, all of one shape.

    Attributes:
        num_experts: E.
        num_experts_per_token: How many a token goes through.
        intermediate_size: F of each.
        activation: Of the gate.
        router: How they are chosen.
        swiglu_limit: gpt-oss's gate: ``(up + 1) * gate * sigmoid(alpha * gate)`` with gate at most
            the limit and up between it and its negative; None for ``act(gate) * up``.
        swiglu_alpha: That alpha.
        has_bias: Whether the products of an expert have biases.
        shared: What every token goes through as well; None for nothing.
        has_shared_gate: Whether the sigmoid of one more product weighs that.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    activation: str
    router: RouterSpec = RouterSpec()
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    has_bias: bool = False
    shared: FeedForwardSpec | None = None
    has_shared_gate: bool = False


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

    attention: AttentionSpec | LatentAttentionSpec | None
    feed_forward: FeedForwardSpec | ExpertsSpec | None
    attention_norm: NormSpec | None = NormSpec()
    feed_forward_norm: NormSpec | None = NormSpec()
    attention_out_norm: NormSpec | None = None
    feed_forward_out_norm: NormSpec | None = None
    wiring: Wiring = "sequential"
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
        num_token_types: Rows of an embedding of the part of a pair that a token belongs to
            (encoders alone); 0 for none.
    """

    scale: float = 1.0
    num_positions: int = 0
    position_offset: int = 0
    num_token_types: int = 0
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
class LabelsSpec:
    """Of an encoder, from a sequence's first token x [D] to scores: ``out(act(dense(x)))``.

    Attributes:
        num_labels: Scores.
        activation: Of the inner layer, which is [D, D]: "tanh" or "relu".
    """

    num_labels: int
    activation: Literal["tanh", "relu"] = "tanh"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder, whole; or an encoder, whose tokens see those behind them too.

    Attributes:
        architecture: Hugging Face's name of it.
        max_position_embeddings: The longest sequence that it was made for, scaling included.
        final_norm: Behind the last layer; None where that layer has normalised.
        is_encoder: Whether it is one: it makes no text, and has no head over the vocabulary.
        labels: What scores sequences, of an encoder that does; None for none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    embedding: EmbeddingSpec = EmbeddingSpec()
    head: HeadSpec = HeadSpec()
    is_encoder: bool = False
    labels: LabelsSpec | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)
