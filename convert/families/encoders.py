"""Encoders of the BERT family: norms behind the sums, learned positions, biases everywhere.

They differ in names, in the row where positions begin, and in what scores a sequence. Heads that
predict masked words are not computed.
Source: the configurations and the modules of transformers' BertModel, RobertaModel,
XLMRobertaModel and DistilBertModel; arXiv:1810.04805, 1907.11692, 1910.01108.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

from jaxengine.convert.families import fields
from jaxengine.convert.families.decoder_table import Layout, decoder_table
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.uniform import ungated, uniform_spec
from jaxengine.convert.model_spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LabelsSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)
from jaxengine.convert.rules import Table, same

MAX_LABELS = 1 << 16
MAX_TOKEN_TYPES = 1 << 10


@dataclass(frozen=True)
class Encoder:
    """What a family of encoders has of its own.

    Attributes:
        layout: Where its tensors are.
        dense: The inner layer of what scores a sequence.
        out: The outer one.
        token_types: The embedding of token types; "" for none.
        activation: Between dense and out.
        pads_positions: Whether positions begin behind the row of the padding token.
    """

    layout: Layout
    dense: str
    out: str
    token_types: str = ""
    activation: Literal["tanh", "relu"] = "tanh"
    pads_positions: bool = False


BERT_LAYOUT = Layout(
    prefix="bert.",
    embedding="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    embedding_norm="bert.embeddings.LayerNorm",
    layer="bert.encoder.layer.{i}",
    attention_norm="attention.output.LayerNorm",
    feed_forward_norm="output.LayerNorm",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    gate_up=("intermediate.dense",),
    down="output.dense",
    head="cls.predictions.decoder",
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    # Names of checkpoints that TensorFlow has made.
    unused=("cls.", "lm_head."),
)
BERT = Encoder(
    BERT_LAYOUT, "bert.pooler.dense", "classifier", "bert.embeddings.token_type_embeddings"
)
ROBERTA = Encoder(
    replace(
        BERT_LAYOUT,
        prefix="roberta.",
        embedding="roberta.embeddings.word_embeddings",
        positions="roberta.embeddings.position_embeddings",
        embedding_norm="roberta.embeddings.LayerNorm",
        layer="roberta.encoder.layer.{i}",
        head="lm_head.decoder",
    ),
    "classifier.dense",
    "classifier.out_proj",
    "roberta.embeddings.token_type_embeddings",
    pads_positions=True,
)
DISTILBERT = Encoder(
    Layout(
        prefix="distilbert.",
        embedding="distilbert.embeddings.word_embeddings",
        positions="distilbert.embeddings.position_embeddings",
        embedding_norm="distilbert.embeddings.LayerNorm",
        layer="distilbert.transformer.layer.{i}",
        attention_norm="sa_layer_norm",
        feed_forward_norm="output_layer_norm",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        gate_up=("ffn.lin1",),
        down="ffn.lin2",
        head="vocab_projector",
        ignored=("embeddings.position_ids",),
        unused=("vocab_",),
    ),
    "pre_classifier",
    "classifier",
    activation="relu",
)


def spec(config: Config, encoder: Encoder) -> ModelSpec:
    """The spec of an encoder's config.

    Raises:
        ValueError: If a field is missing or makes no sense.
    """
    D = fields.integer(config, "hidden_size", "dim")
    N = fields.integer(config, "num_attention_heads", "n_heads", high=fields.MAX_HEADS)
    if D % N:
        raise ValueError(
            f"config.json has hidden size {D}, which {N} attention heads do not divide"
        )
    positions = fields.text(config, "position_embedding_type", default="absolute")
    if positions != "absolute" or fields.flag(config, "is_decoder"):
        raise ValueError(
            f"config.json has position_embedding_type={positions!r} and is_decoder="
            f"{config.get('is_decoder')}: encoders are served with 'absolute' and false"
        )
    norm = NormSpec(
        "layer", fields.number(config, "layer_norm_eps", default=1e-12, low=0.0), has_bias=True
    )
    attention = AttentionSpec(N, N, D // N, (D // N) ** -0.5, qkv_bias=True, out_bias=True)
    width = fields.integer(config, "intermediate_size", "hidden_dim")
    activation = fields.text(config, "hidden_act", "activation", default="gelu")
    offset = 0
    if encoder.pads_positions:
        offset = fields.integer(config, "pad_token_id", default=1, low=0) + 1
    length = fields.max_positions(config, default=512) - offset
    if length < 1:
        raise ValueError(
            f"config.json has max_position_embeddings={length + offset}, and the first {offset} "
            "stand for padding: a larger number is needed"
        )
    num_types = 0
    if encoder.token_types:
        num_types = fields.integer(config, "type_vocab_size", default=2, high=MAX_TOKEN_TYPES)
    scores = config["architectures"][0].endswith("ForSequenceClassification")
    return uniform_spec(
        {**config, "hidden_size": D},
        LayerSpec(attention, ungated(width, activation), norm, norm, wiring="post"),
        final_norm=None,
        length=length,
        embedding=EmbeddingSpec(
            num_positions=length, position_offset=offset, num_token_types=num_types, norm=norm
        ),
        head=HeadSpec(is_tied=True),
        is_encoder=True,
        labels=LabelsSpec(num_labels(config), encoder.activation) if scores else None,
    )


def num_labels(config: Config) -> int:
    """How many labels a config has: as many as have names, two where it says nothing."""
    names = fields.mapping(config, "id2label")
    return len(names) or fields.integer(config, "num_labels", default=2, high=MAX_LABELS)


def table(spec: ModelSpec, encoder: Encoder) -> Table:
    """Return the table of an encoder: a decoder's, token types, and what scores sequences."""
    D, layout = spec.hidden_size, encoder.layout
    rules = []
    if spec.embedding.num_token_types:
        shape = (spec.embedding.num_token_types, D)
        rules.append(same("embed_token_types.weight", f"{encoder.token_types}.weight", shape))
    unused = layout.unused
    if spec.labels is None:
        # What pretraining has left, which no task of a bare encoder reads.
        unused = (*unused, "pooler.", f"{layout.prefix}pooler.")
    else:
        for ours, theirs, size in (
            ("labels.dense", encoder.dense, D),
            ("labels.out", encoder.out, spec.labels.num_labels),
        ):
            rules.append(same(f"{ours}.weight", f"{theirs}.weight", (size, D)))
            rules.append(same(f"{ours}.bias", f"{theirs}.bias", (size,)))
    decoder = decoder_table(spec, layout)
    return replace(decoder, rules=(*decoder.rules, *rules), unused=unused)


def _family(encoder: Encoder, name: str, examples: str, *others: str) -> Family:
    endings = ("Model", "ForSequenceClassification", "ForMaskedLM", *others)
    return Family(
        tuple(f"{name}{ending}" for ending in endings),
        functools.partial(spec, encoder=encoder),
        functools.partial(table, encoder=encoder),
        examples=examples,
    )


FAMILIES = (
    _family(BERT, "Bert", "BERT, MiniLM, BGE, E5, GTE; ms-marco rerankers", "ForPreTraining"),
    _family(ROBERTA, "Roberta", "RoBERTa, all-distilroberta-v1"),
    _family(ROBERTA, "XLMRoberta", "XLM-R, multilingual E5, BGE-M3 (dense), bge-reranker"),
    _family(DISTILBERT, "DistilBert", "DistilBERT, msmarco-distilbert"),
)
