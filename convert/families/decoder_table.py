"""The table of a decoder, from its spec and from where its family keeps the tensors.

Families differ in names, in which tensors are joined, and in the order of rows. What a layer has
(biases, norms, gates) the spec says already, so that a family writes down a ``Layout`` and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxengine.convert.families.experts_table import SEPARATE, ExpertsLayout, experts_rules
from jaxengine.convert.model_spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)
from jaxengine.convert.rules import Rule, Shape, Source, Table, same

# Caches of the rotary embedding and of the mask that old versions of transformers saved.
BUFFERS = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    *("rotary_pos_emb.inv_freq", "attn.bias", "attn.masked_bias"),
    *("attention.bias", "attention.masked_bias"),
)


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its tensors.

    Names inside a layer are relative to ``layer``; the others are whole. A missing part of the
    spec needs no name.

    Attributes:
        prefix: What checkpoints of the bare model leave out of the names.
        layer: "{i}" stands for the layer.
        qkv: One name for each of q, k and v; or one for q and one for both others, per KV head its
            key and its value; or one for all three.
        joined: How one tensor holds all three: "grouped" as our parameter does, per KV head its
            queries, its key and its value; "stacked": all queries, all keys, all values.
        gate_up: Names of gate and up, of one tensor with gate first, or of an ungated up.
        is_transposed: Whether weights of attention and feed-forward are [in, out].
        pairs_neighbours: Whether the rotary embedding turns dimensions 2j and 2j + 1 together.
        head_norms: Names for queries and keys; "{h}" stands for the head where each has a tensor.
        experts: Where mixtures are.
        project_in: From the token embeddings to the residual stream, where their widths differ.
        project_out: From the residual stream to what the head multiplies.
        renamed: See ``Table``.
        unused: See ``Table``.
    """

    prefix: str = "model."
    embedding: str = "model.embed_tokens"
    positions: str = ""
    embedding_norm: str = ""
    layer: str = "model.layers.{i}"
    attention_norm: str = "input_layernorm"
    feed_forward_norm: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    feed_forward_out_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    joined: Literal["grouped", "stacked"] = "stacked"
    out: str = "self_attn.o_proj"
    head_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    sinks: str = "self_attn.sinks"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    experts: ExpertsLayout = SEPARATE
    is_transposed: bool = False
    pairs_neighbours: bool = False
    final_norm: str = "model.norm"
    head: str = "lm_head"
    project_in: str = ""
    project_out: str = ""
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


def decoder_table(spec: ModelSpec, layout: Layout) -> Table:
    """Return the table of a decoder."""
    head = (f"{layout.head}.weight",) if spec.head.is_tied else ()
    return Table(
        tuple(_rules(spec, layout)),
        ignored=(*BUFFERS, *layout.ignored, *head),
        prefix=layout.prefix,
        renamed=layout.renamed,
        unused=layout.unused,
    )


def _rules(spec: ModelSpec, layout: Layout) -> Iterator[Rule]:
    D, V, embedding = spec.hidden_size, spec.vocab_size, spec.embedding
    # A tied checkpoint may hold either name, or both, which are the same values.
    other_names = (f"{layout.head}.weight",) if spec.head.is_tied else ()
    size = embedding.size or D
    yield same("embed_tokens.weight", f"{layout.embedding}.weight", (V, size), *other_names)
    if embedding.num_positions:
        positions = (embedding.num_positions + embedding.position_offset, D)
        yield same("embed_positions.weight", f"{layout.positions}.weight", positions)
    if embedding.size is not None:
        yield same("project_in.weight", f"{layout.project_in}.weight", (D, size))
        yield same("project_out.weight", f"{layout.project_out}.weight", (size, D))
    yield from norm_rules("embed_norm", layout.embedding_norm, embedding.norm, (D,))
    for i, layer in enumerate(spec.layers):
        yield from _layer_rules(D, layer, layout, f"layers.{i}", layout.layer.format(i=i))
    yield from norm_rules("norm", layout.final_norm, spec.final_norm, (D,))
    if not spec.head.is_tied:
        # Whatever a family calls it, new versions of transformers may save it under its usual name.
        usual = () if layout.head == "lm_head" else ("lm_head.weight",)
        head = same("lm_head.weight", f"{layout.head}.weight", (V, size), *usual)
        yield replace(head, is_normalised=spec.head.is_normalised)
    if spec.head.has_bias:
        yield same("lm_head_bias.bias", f"{layout.head}.bias", (V,))


def norm_rules(path: str, name: str, norm: NormSpec | None, shape: Shape) -> Iterator[Rule]:
    """Weight and bias of a norm, as far as it has any."""
    if norm is not None and norm.has_weight:
        yield same(f"{path}.weight", f"{name}.weight", shape)
    if norm is not None and norm.has_bias:
        yield same(f"{path}.bias", f"{name}.bias", shape)


def _layer_rules(D: int, layer: LayerSpec, layout: Layout, path: str, name: str) -> Iterator[Rule]:
    for ours, theirs, norm in (
        ("input_norm", layout.attention_norm, layer.attention_norm),
        ("attention_out_norm", layout.attention_out_norm, layer.attention_out_norm),
        ("post_attention_norm", layout.feed_forward_norm, layer.feed_forward_norm),
        ("mlp_out_norm", layout.feed_forward_out_norm, layer.feed_forward_out_norm),
    ):
        yield from norm_rules(f"{path}.{ours}", f"{name}.{theirs}", norm, (D,))
    if isinstance(layer.attention, AttentionSpec):
        yield from _attention_rules(D, layer.attention, layout, f"{path}.attention", name)
    if isinstance(layer.feed_forward, FeedForwardSpec):
        yield from _feed_forward_rules(D, layer.feed_forward, layout, f"{path}.mlp", name)
    if isinstance(layer.feed_forward, ExpertsSpec):
        mixture, own = layer.feed_forward, layout.experts
        yield from experts_rules(D, mixture, own, f"{path}.mlp", name)
        if mixture.shared is not None:
            shared = replace(layout, gate_up=own.shared_gate_up, down=own.shared_down)
            yield from _feed_forward_rules(D, mixture.shared, shared, f"{path}.mlp.shared", name)


def _attention_rules(
    D: int, attention: AttentionSpec, layout: Layout, path: str, name: str
) -> Iterator[Rule]:
    N, H = attention.num_heads, attention.head_dim
    yield qkv_rule(f"{path}.qkv_proj.weight", attention, layout, name, "weight", D)
    if attention.qkv_bias:
        yield qkv_rule(f"{path}.qkv_proj.bias", attention, layout, name, "bias", 1)
    out = f"{name}.{layout.out}"
    yield _matrix(f"{path}.o_proj.weight", f"{out}.weight", (D,), (N, H), layout.is_transposed)
    if attention.out_bias:
        yield same(f"{path}.o_proj.bias", f"{out}.bias", (D,))
    if attention.has_sinks:
        yield same(f"{path}.sinks", f"{name}.{layout.sinks}", (N,))
    if attention.head_norm is not None:
        for kind, theirs, heads in (
            ("q_norm", layout.head_norms[0], N),
            ("k_norm", layout.head_norms[1], attention.num_kv_heads),
        ):
            own = f"{path}.{kind}", f"{name}.{theirs}"
            yield from _head_norm_rules(*own, attention, heads, layout.pairs_neighbours)


def _head_norm_rules(
    path: str, name: str, attention: AttentionSpec, num_heads: int, pairs_neighbours: bool
) -> Iterator[Rule]:
    """Rules of the norm of queries or keys; its weights turn with the dimensions they belong to."""
    H, head_norm = attention.head_dim, attention.head_norm
    assert head_norm is not None
    shapes = {"head": (H,), "heads": (num_heads, H), "all": (num_heads * H,)}
    shape = shapes[head_norm.scope]
    rope = attention.rope if pairs_neighbours else None
    assert rope is None or head_norm.scope != "all", "no family pairs neighbours so"
    for rule in norm_rules(path, name, head_norm.norm, shape):
        (whole,) = rule.sources
        if "{h}" in name:
            sources = (
                replace(
                    whole, name=whole.name.format(h=head), shape=(H,), box=(1, H), origin=(head,)
                )
                for head in range(num_heads)
            )
            yield replace(rule, sources=tuple(sources))
        elif rope is not None:
            yield replace(rule, sources=tuple(_halves(whole, shape[:-1], H, rope.rotary_dim)))
        else:
            yield rule


def qkv_rule(
    path: str, attention: AttentionSpec, layout: Layout, name: str, kind: str, D: int
) -> Rule:
    """The fused [K, G + 2, H, D], of a bias [K, G + 2, H]: to a KV head queries, key, value."""
    K, H = attention.num_kv_heads, attention.head_dim
    G = attention.num_heads // K
    inner = (D,) if kind == "weight" else ()
    shape = (K, G + 2, H, *inner)
    names = [f"{name}.{tensor}.{kind}" for tensor in layout.qkv]
    if len(names) == 1 and layout.joined == "grouped":
        return Rule(path, shape, tuple(_heads(names[0], shape, shape, layout, attention, None, 0)))
    if len(names) == 2:
        assert not layout.pairs_neighbours, "no family joins keys and values and pairs neighbours"
        q = Source(names[0], (K * G * H, *inner), (K, G, H, *inner))
        return Rule(
            path, shape, (q, Source(names[1], (K * 2 * H, *inner), (K, 2, H, *inner), (0, G)))
        )
    sources: list[Source] = []
    first = 0
    for number, (position, heads) in enumerate(((0, G), (G, 1), (G + 1, 1))):
        own = names[number] if len(names) == 3 else names[0]
        rows = None if len(names) == 3 else (first, first + K * heads * H)
        box = (K, heads, H, *inner)
        sources += _heads(own, shape, box, layout, attention, rows, position)
        first += K * heads * H
    return Rule(path, shape, tuple(sources))


def _heads(
    name: str,
    shape: Shape,
    box: Shape,
    layout: Layout,
    attention: AttentionSpec,
    rows: tuple[int, int] | None,
    position: int,
) -> Iterator[Source]:
    """Sources of some heads of a fused parameter of ``shape``, from rows of one tensor."""
    K, heads, H, *inner = box
    num_rows = K * (shape[1] if rows is not None or box == shape else heads) * H
    stored = (num_rows, *inner)
    if layout.is_transposed and inner:
        yield Source(
            name,
            (inner[0], num_rows),
            box,
            origin=(0, position, 0, 0),
            view=(inner[0], num_rows // H, H),
            cut=(None, None if rows is None else (rows[0] // H, rows[1] // H)),
            axes=(1, 2, 0),
        )
        return
    rope = attention.rope
    is_value = position == shape[1] - 1
    whole = Source(name, stored, box, (0, position), rows=rows)
    if not layout.pairs_neighbours or rope is None or is_value:
        yield whole
        return
    assert box != shape, "a grouped tensor with paired neighbours has no family yet"
    yield from _halves(whole, (K, heads), H, rope.rotary_dim)


def _halves(whole: Source, heads: Shape, H: int, R: int) -> Iterator[Source]:
    """Sources of heads [*heads, H, ...] whose family pairs neighbours in the rotary embedding.

    Their rotated dimensions come as all even ones, then all odd ones: the halves that we pair.
    """
    inner = whole.box[len(heads) + 1 :]
    yield replace(
        whole,
        box=(*heads, R, *inner),
        view=(_size(heads), H // 2, 2, *inner),
        cut=(None, (0, R // 2)),
        axes=(0, 2, 1, *range(3, 3 + len(inner))),
    )
    if R < H:
        # The view's leading axes are those of the box, so that few rows are read of each.
        origin = (*whole.origin, *(0,) * (len(heads) - len(whole.origin)), R)
        box = (*heads, H - R, *inner)
        cut = (*(None,) * len(heads), (R, H))
        yield replace(whole, box=box, origin=origin, view=whole.box, cut=cut)


def _feed_forward_rules(
    D: int, spec: FeedForwardSpec, layout: Layout, path: str, name: str
) -> Iterator[Rule]:
    F = spec.intermediate_size
    names = [f"{name}.{tensor}" for tensor in layout.gate_up]
    if spec.is_gated:
        yield stacked_rule(f"{path}.gate_up_proj.weight", names, "weight", F, (D,))
        if spec.up_bias:
            yield stacked_rule(f"{path}.gate_up_proj.bias", names, "bias", F, ())
    else:
        is_transposed = layout.is_transposed
        yield _matrix(f"{path}.up_proj.weight", f"{names[0]}.weight", (F,), (D,), is_transposed)
        if spec.up_bias:
            yield same(f"{path}.up_proj.bias", f"{names[0]}.bias", (F,))
    down = f"{name}.{layout.down}"
    yield _matrix(f"{path}.down_proj.weight", f"{down}.weight", (D,), (F,), layout.is_transposed)
    if spec.down_bias:
        yield same(f"{path}.down_proj.bias", f"{down}.bias", (D,))


def stacked_rule(path: str, names: Sequence[str], kind: str, F: int, inner: Shape) -> Rule:
    """The fused [2, F, ...] of gate and up, from two tensors or from one that holds both."""
    shape = (2, F, *inner)
    if len(names) == 1:
        return Rule(path, shape, (Source(f"{names[0]}.{kind}", (2 * F, *inner), shape),))
    sources = (
        Source(f"{name}.{kind}", (F, *inner), (1, F, *inner), (half,))
        for half, name in enumerate(names)
    )
    return Rule(path, shape, tuple(sources))


def _matrix(path: str, name: str, out: Shape, inner: Shape, is_transposed: bool) -> Rule:
    """A weight [*out, *inner], stored flat, as [out, in] or [in, out]."""
    num_out, num_in = _size(out), _size(inner)
    shape = (*out, *inner)
    if not is_transposed:
        return Rule(path, shape, (Source(name, (num_out, num_in), shape),))
    axes = (*range(len(inner), len(inner) + len(out)), *range(len(inner)))
    source = Source(name, (num_in, num_out), shape, view=(*inner, *out), axes=axes)
    return Rule(path, shape, (source,))


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
